# The one entry. Every target makes the environment it needs; nothing has to be installed beforehand but Python and make.
#
#   make demo    the whole loop on this machine, ends with a table and demo-out/report.html
#   make test    the test suite (ISTHMUS_EMOPAIR=<folder> adds the tests on real speech and faces)
#   make lint    ruff, mypy strict, the import contracts, generated code up to date, buf
#   make bench   measurements, printed and never asserted
#   make proto   generate the protobuf code again
#   make clean   remove environments, caches and the demo's output

PYTHON ?= python3
VENV := .venv
EDGE_VENV := .venv-edge
BIN := $(VENV)/bin

# An environment is made again only when the content of what defines it changes.
KEY := $(shell cat pyproject.toml setup.py constraints.txt | cksum | tr ' ' '-')
INSTALLED := $(VENV)/installed-$(KEY)
EDGE_INSTALLED := $(EDGE_VENV)/installed-$(KEY)

# One compute thread per process unless told otherwise: two threads on a busy two-core machine are slower than one.
test bench: export OMP_NUM_THREADS ?= 1

DEMO_ARGS ?=

.PHONY: demo test lint bench proto clean install install-edge
.DELETE_ON_ERROR:

install: $(INSTALLED)
install-edge: $(EDGE_INSTALLED)

$(INSTALLED): | pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip check
	rm -f $(VENV)/installed-*
	touch $@

# The device's environment: what a small board would install. Torch must not be in it.
$(EDGE_INSTALLED): | pyproject.toml
	test -x $(EDGE_VENV)/bin/python || $(PYTHON) -m venv $(EDGE_VENV)
	$(EDGE_VENV)/bin/python -m pip install --quiet --upgrade pip setuptools
	$(EDGE_VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[edge]'
	$(EDGE_VENV)/bin/python -m pip check
	$(EDGE_VENV)/bin/python -c "import importlib.util as u, sys; sys.exit('torch is in the edge environment' if u.find_spec('torch') else 0)"
	rm -f $(EDGE_VENV)/installed-*
	touch $@

demo: $(INSTALLED) $(EDGE_INSTALLED)
	$(BIN)/isthmus demo --edge-python $(EDGE_VENV)/bin/python $(DEMO_ARGS)

# A process of tests for each core; one file's tests stay together, and share what their fixtures made.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd .typing && ../$(BIN)/lint-imports --config ../pyproject.toml
	$(BIN)/python -m isthmus.proto.generate --check
	$(BIN)/buf lint proto

bench: $(INSTALLED) $(EDGE_INSTALLED)
	for name in selection encoder teacher_cache training stream footprint elastic.planning elastic.drift elastic.model_sizes elastic.infaas_live elastic.front elastic.engine elastic.vit elastic.warmup; do $(BIN)/python -m tests.bench.$$name || exit 1; done

proto: $(INSTALLED)
	$(BIN)/python -m isthmus.proto.generate

clean:
	rm -rf $(VENV) $(EDGE_VENV) demo-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
