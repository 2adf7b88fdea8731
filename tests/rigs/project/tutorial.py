"""Runs the blocks of tutorials like a reader: shell and Python in order, servers in a second terminal."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from isthmus.demo.processes import ending_with_parent
from tests.rigs.project import commands
from tests.rigs.project.pages import ROOT, Block, blocks

START_LIMIT_S: Final = 600.0
COMMAND_LIMIT_S: Final = 900.0
STOP_LIMIT_S: Final = 300.0

_CAT = re.compile(r"\$\(cat ([\w.-]+)\)")
_SHELL_ALONE = re.compile(r"[|&;<>*?~`$]")


def treatment(block: Block) -> str:
    """Return how a block of code is treated: "run", "run alone", "background", "check" or "not run"."""
    named = block.mark.partition(":")[0]
    if named in ("check", "background", "not run"):
        return named
    if named == "run" and block.language != "python":
        return "run alone"
    return "run" if block.language == "python" or "tutorials" in block.page.parts else "check"


def environment() -> dict[str, str]:
    """Return the environment of a terminal that finds this checkout's ``isthmus``."""
    paths = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }
    return {**os.environ, "OMP_NUM_THREADS": "1", **paths}


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block of Python in ``namespace``. The text is this repository's own documentation."""
    exec(compile(block.text, str(block), "exec"), namespace)  # noqa: S102


def plain_calls(text: str) -> list[list[str]] | None:
    """Return the words of each command, if a block has nothing but ``isthmus`` commands; None if it needs a shell.

    ``$(cat FILE)`` is replaced by what the file holds.
    """
    calls = []
    for line in text.replace("\\\n", " ").splitlines():
        filled = _CAT.sub(lambda found: Path(found[1]).read_text().strip(), line)
        if _SHELL_ALONE.search(filled):
            return None
        words = shlex.split(filled, comments=True)
        if words and words[0] != "isthmus":
            return None
        calls += [words[1:]] if words else []
    return calls


class Tutorial:
    """Runs pages in one folder, the working folder. Background processes end with the ``with`` block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._servers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Tutorial":
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.terminate()  # as a service manager does it; a shell lets background processes ignore SIGINT
        for server in self._servers:
            server.wait(timeout=STOP_LIMIT_S)

    def run(self, page: str) -> None:
        """Run the blocks of docs/tutorials/``page`` in the working directory. Raises for a failed block."""
        namespace: dict[str, Any] = {"__name__": "__main__"}
        for block in blocks(ROOT / "docs" / "tutorials" / page):
            match block.language, treatment(block):
                case "python", "run":
                    run_python(block, namespace)
                case "sh", "run":
                    self._shell(block)
                case "sh", "background":
                    self._start(block, self._folder / block.mark.partition(":")[2].strip())

    def _shell(self, block: Block) -> None:
        calls = plain_calls(block.text)
        if calls is not None:
            for words in calls:
                code, printed = commands.ended(words)
                assert code == 0, f"{block}\n{printed}"
            return
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=self._folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=COMMAND_LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"

    def _start(self, block: Block, ready: Path) -> None:
        log = self._folder / f"{ready.name}.log"
        with log.open("wb") as output:
            server = subprocess.Popen(
                ending_with_parent(["bash", "-c", f"exec {block.text.strip()}"]),
                cwd=self._folder,
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._servers.append(server)
        limit_s = time.monotonic() + START_LIMIT_S
        while not ready.exists():
            assert server.poll() is None and time.monotonic() < limit_s, f"{block}\n{log.read_text()}"
            time.sleep(0.1)
