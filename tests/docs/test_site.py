"""The documentation site: a broken link fails its build, and every generated part is complete."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import isthmus
from isthmus.cli import SUBCOMMANDS
from isthmus.command_line import option_fields
from tests.rigs.project.pages import ROOT
from tests.rigs.project.site import reference_pages


def _build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    options = ["-q", "-W", "-c", str(ROOT / "docs"), "-b", "html"]
    command = [sys.executable, "-m", "sphinx", *options, str(source), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the source of a site of two pages that builds without a warning."""
    folder = tmp_path_factory.mktemp("site")
    source = folder / "source"
    source.mkdir()
    (source / "other.md").write_text("---\norphan: true\n---\n# Other\n")
    (source / "index.md").write_text("# Page\n\n[whole](other.md)\n")
    whole = _build(source, folder / "whole")
    assert whole.returncode == 0, whole.stderr
    return source


@pytest.mark.parametrize("link", ["gone.md", "other.md#gone", "gone.svg"])
def test_a_broken_link_fails_the_build(link: str, site: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(site, source)
    (source / "index.md").write_text(f"# Page\n\n{'!' * link.endswith('svg')}[broken]({link})\n")
    broken = _build(source, tmp_path / "broken")
    assert broken.returncode != 0
    assert "index.md:3" in broken.stderr


def test_the_reference_has_every_command() -> None:
    text = reference_pages.commands()
    for name in SUBCOMMANDS:
        assert f"## isthmus {name}\n" in text
    assert "| `--min-cluster" in text


def test_the_reference_has_every_public_name() -> None:
    text = reference_pages.api()
    assert [name for name in isthmus.__all__ if f"### {name}\n" not in text] == []


def test_the_reference_has_every_rpc_and_error() -> None:
    rpcs, errors = reference_pages.rpcs(), reference_pages.errors()
    assert "`WatchJob(WatchJobRequest) → stream WatchJobResponse`" in rpcs
    assert "`MakeQuery(" in rpcs
    assert "| `Busy` | `RESOURCE_EXHAUSTED` | yes |" in errors


def test_the_reference_has_every_setting_with_its_meaning() -> None:
    rows = [row.strip("|").split(" | ") for row in reference_pages.settings().splitlines()[2:]]
    assert [row[0].strip(" `") for row in rows] == [field.name for field in option_fields(isthmus.CloudSettings)]
    assert all(row[-1].strip() for row in rows)


def test_links_that_leave_the_site_become_text(tmp_path: Path) -> None:
    text = "[edge/own_clips/guard.py](../edge/own_clips/guard.py), [log](log.md), [rooms](decisions) and [x](https://y)"
    expected = "`edge/own_clips/guard.py`, [log](log.md), `rooms` and [x](https://y)"
    assert reference_pages.unlinked(text, ROOT / "docs") == expected
