"""An extension in the server's worker processes, installed as a package would be: they import it when they start."""

import os
import textwrap
from pathlib import Path

import pytest


def install_extension(folder: Path, code: str, patch: pytest.MonkeyPatch) -> None:
    """Let processes that are started from here on run ``code``. This process does not."""
    packages = folder / "packages"
    about = packages / "added-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: added\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[isthmus.extensions]\nadded = added\n")
    (packages / "added.py").write_text(textwrap.dedent(code))
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(packages), os.environ.get("PYTHONPATH", "")))))
