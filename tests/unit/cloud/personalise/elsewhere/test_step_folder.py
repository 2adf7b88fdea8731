"""The folder of a step goes with the step, also if its process is killed."""

import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isthmus import __version__
from isthmus.cloud.personalise.elsewhere.on_ray import StepActor
from isthmus.cloud.personalise.elsewhere.step_folder import PREFIX, step_folder
from isthmus.distill.selection import Selection
from tests.rigs.cloud.jobs import CountedLearning

HOLDS = """
import sys
from isthmus.cloud.personalise.elsewhere.step_folder import step_folder

with step_folder() as folder:
    (folder / "checkpoint.safetensors").write_bytes(b"a person's student")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_removed_with_its_step_and_no_other_one_is(temporary: Path) -> None:
    (temporary / "other").mkdir()
    with step_folder() as first, step_folder() as second:
        (first / "checkpoint").write_bytes(b"a")
        assert first != second and first.name.startswith(PREFIX) and second.is_dir()
    assert os.listdir(temporary) == ["other"]


def test_what_a_killed_process_has_left_is_removed_and_what_is_in_use_is_not(temporary: Path) -> None:
    command = [sys.executable, "-c", HOLDS]
    env = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        held = Path(process.stdout.readline().strip())
        with step_folder():
            assert (held / "checkpoint.safetensors").exists(), "its process is at work"
        process.kill()
    assert held.parent == temporary and held.exists()
    with step_folder():
        assert not held.exists()


def test_an_actor_that_is_to_end_removes_the_files_of_its_step(temporary: Path) -> None:
    began, go_on = threading.Event(), threading.Event()

    def pause(step: str) -> None:
        began.set()
        go_on.wait()

    class Counted(StepActor):
        @staticmethod
        def _opened(release: str, release_hash: str, threads: int | None) -> CountedLearning:
            return CountedLearning(pause)

    actor = Counted("release", "hash", __version__, None)
    actor.leave()
    arguments = ("call", "distil", Selection.whole(2), 0, 1, 1, {"checkpoint.safetensors": b""})
    with ThreadPoolExecutor(1) as threads:
        step = threads.submit(actor.perform, *arguments)
        began.wait()
        (folder,) = temporary.iterdir()
        assert list(folder.iterdir())
        actor.leave()
        assert not folder.exists()
        go_on.set()
        with pytest.raises(FileNotFoundError):
            step.result()
    assert not list(temporary.iterdir())
