"""Extras install what the code imports, and pins are within their ranges."""

import ast
import hashlib
import importlib.metadata as metadata
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from isthmus import __version__
from isthmus.cloud.elastic.tasks.task import TaskSpec

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split())
RELEASES = ROOT / "tests" / "golden" / "releases"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

# The extra with which a file must run; the longest path decides.
EXTRA_OF = {
    "proto/": "client",
    "proto/generate.py": "dev",
    "edge/": "edge",
    "edge/commands/page.py": "page",
    "edge/page/": "page",
    "data/": "edge",
    "data/images.py": "elastic",
    "data/synthetic/": "train",
    "distill/": "train",
    "cloud/": "cloud",
    "cloud/cluster/": "ray",
    "cloud/elastic/executors/on_ray.py": "ray",
    "cloud/elastic/model/": "elastic",
    "cloud/generation/": "generate",
    "cloud/http/": "generate",
    "cloud/commands/paging.py": "generate",
    "cloud/page/": "generate",
    "cloud/personalise/elsewhere/kept.py": "ray",
    "cloud/personalise/elsewhere/on_ray.py": "ray",
    "cloud/personalise/elsewhere/shards_on_ray.py": "ray",
    "cloud/replicas/on_ray.py": "ray",
    "cloud/tracing.py": "otel",
    "isthmus/": "demo",
    "isthmus/link/": "link",
    "isthmus/page/": "page",
}

ONLY_WHAT_THE_EXTRA_HAS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

missing = Missing()
missing.missing = set(sys.argv[1].split(","))
sys.meta_path.insert(0, missing)
"""


def own(extra: str) -> list[Requirement]:
    """Return the direct requirements of the extra, with those of the extras of ours that it names."""
    found = []
    for line in EXTRAS[extra]:
        requirement = Requirement(line)
        if requirement.name == "isthmus":
            for other in requirement.extras:
                found += own(other)
        else:
            found.append(requirement)
    return found


def requires(distribution: str) -> list[str]:
    """Return the requirements of a distribution; none if it is not installed here."""
    try:
        return metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return []


@cache
def brought(extra: str) -> frozenset[str]:
    """Return the names of all distributions that the extra installs, according to this environment."""
    todo = [*own(extra), *map(Requirement, PROJECT["project"]["dependencies"])]
    names: set[str] = set()
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement = todo.pop()
        for wanted in ("", *requirement.extras):
            if (requirement.name, wanted) in seen:
                continue
            seen.add((requirement.name, wanted))
            names.add(canonicalize_name(requirement.name))
            for line in requires(requirement.name):
                further = Requirement(line)
                if further.marker is None or further.marker.evaluate({"extra": wanted}):
                    todo.append(further)
    return frozenset(names)


def distributions() -> dict[str, set[str]]:
    return {
        module: {canonicalize_name(name) for name in names}
        for module, names in metadata.packages_distributions().items()
        if module not in sys.stdlib_module_names and module != "isthmus"
    }


def imported(path: Path) -> set[str]:
    """Return the first names of all imports in a file, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"isthmus"}


def test_each_file_imports_only_what_its_extra_brings() -> None:
    known = distributions()
    missing = []
    for room in ("proto", "edge", "data", "distill", "cloud", "isthmus"):
        for path in sorted((ROOT / room).rglob("*.py")):
            place = path.relative_to(ROOT).as_posix()
            extra = EXTRA_OF[max((each for each in EXTRA_OF if place.startswith(each)), key=len)]
            for module in sorted(imported(path)):
                if not known.get(module, set()) & brought(extra):
                    missing.append(f"{place} imports {module}, which isthmus[{extra}] does not install")
    assert not missing


def run_with(extra: str, code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python that can import only what an installation of the extra has."""
    missing = [name for name, found in distributions().items() if not found & brought(extra)]
    assert "torch" in missing
    command = [sys.executable, "-c", ONLY_WHAT_THE_EXTRA_HAS + code, ",".join(missing), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize(
    "words",
    [
        ("query", "animals", "README.md"),
        ("tasks",),
        ("remove", "animals"),
        ("register", "{folder}/animals.json"),
    ],
    ids=lambda words: words[0],
)
def test_a_client_needs_its_extra_alone(words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "animals.json").write_text(TaskSpec("animals", ("cat", "dog")).to_json())
    (tmp_path / "animals.safetensors").write_bytes(b"weights")
    command = ["elastic", *(word.format(folder=tmp_path) for word in words), "--server", "127.0.0.1:1"]
    done = run_with("client", "from isthmus.cli import main\nsys.exit(main(sys.argv[2:]))", *command)
    assert done.returncode == 1
    assert "failed to connect" in done.stderr


def test_every_module_of_the_device_needs_its_extra_alone() -> None:
    others = tuple(
        f"isthmus.{place.removesuffix('.py').rstrip('/').replace('/', '.')}"
        for place, extra in EXTRA_OF.items()
        if place.startswith("edge/") and extra != "edge"
    )
    code = (
        "import importlib, pkgutil, isthmus.edge\n"
        "for found in pkgutil.walk_packages(isthmus.edge.__path__, 'isthmus.edge.'):\n"
        f"    if not found.name.startswith({others}):\n"
        "        importlib.import_module(found.name)\n"
    )
    done = run_with("edge", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("extra", EXTRAS)
def test_extras_give_ranges_and_constraints_pin_a_version_within(extra: str) -> None:
    for requirement in own(extra):
        pinned = {canonicalize_name(name): version for name, version in PINS.items()}.get(
            canonicalize_name(requirement.name)
        )
        if extra != "s3" and not requirement.name.startswith("types-"):
            assert pinned, f"{requirement.name} has no pin in constraints.txt"
            assert requirement.specifier.contains(pinned), f"{requirement} excludes the pinned {pinned}"
        exact = [each for each in requirement.specifier if each.operator in ("==", "===")]
        assert not exact or requirement.name == "grpcio-tools", f"{requirement} leaves no choice"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_every_step_of_a_workflow_is_a_make_target(workflow: Path) -> None:
    text = workflow.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    runs = re.findall(r"\brun:\s*(.*)", text)
    assert runs
    for command in runs:
        make, *named = command.split()
        assert make == "make" and named
        assert set(named) <= targets
    for action in re.findall(r"\buses:\s*(\S+)", text):
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action), f"{action} is not pinned to a commit"


@pytest.mark.parametrize(
    ("tag", "said"), [("v9.9.9", "the tag is 'v9.9.9'"), ("v1'; touch x; '", "the tag is"), (f"v{__version__}", "")]
)
def test_a_release_is_refused_if_the_tag_is_not_the_version(tag: str, said: str) -> None:
    done = subprocess.run(
        ["make", "release-check"], cwd=ROOT, env={**os.environ, "TAG": tag}, capture_output=True, text=True, check=False
    )
    if said:
        assert done.returncode != 0
        assert said in done.stderr
    elif "dev" in __version__:
        assert f"{__version__} is a development version" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
    assert not (ROOT / "x").exists()


def test_the_kept_releases_are_the_ones_that_were_built() -> None:
    sums = dict(reversed(line.split()) for line in (RELEASES / "SHA256SUMS").read_text(encoding="utf-8").splitlines())
    wheels = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in RELEASES.glob("*.whl")}
    assert wheels == sums
