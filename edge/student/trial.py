"""A trial run of a student from the cloud, in a child process with bounds on time, memory and output.

The parent starts ``python -m isthmus.edge.student.trial``, writes one line of JSON to it and reads one line back. A
student that loops for ever, allocates without bound or crashes ONNX Runtime harms only the child. Files with loops,
branches or weights elsewhere are refused before (onnx_file.py): they could misbehave later, on certain clips.
"""

import contextlib
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.edge.student.encoder import check_student, probe_runtime
from isthmus.edge.student.onnx_file import check_model_file
from isthmus.edge.student.trust import Unfit
from isthmus.proto.errors import Corrupt, InvalidInput, IsthmusError
from isthmus.proto.messages import StudentFile, StudentManifest

_OUTPUT_BYTES = 4096


@dataclass(frozen=True)
class Bounds:
    """``memory_bytes`` is allocated beyond the child's own memory, and ``per_file_byte`` times the student's files."""

    wall_s: float = 25.0
    cpu_s: int = 20
    memory_bytes: int = 256 << 20
    per_file_byte: int = 4


def try_student(folder: Path, manifest: StudentManifest, bounds: Bounds = Bounds()) -> None:
    """Check every model file of the student, and run each in a child process on a silent and on a noisy clip.

    Raises Unfit if it passes a bound, crashes, or gives wrong widths or values, and RuntimeUnusable if ONNX Runtime
    does not run at all.
    """
    from isthmus.data.transforms import InputSpec  # Imported here: the child has no use for it.

    probe_runtime()
    try:
        spec = InputSpec.from_json(manifest.input_spec_json)
    except ValueError as error:
        raise Unfit(f"student {manifest.student_id}: {error}") from error
    for file in manifest.files:
        try:
            check_model_file(folder / file.name)
        except InvalidInput as error:
            raise Unfit(f"student {manifest.student_id} is refused: {error}") from error
    request = {
        "folder": str(folder.resolve()),
        "spectrogram_FT": [spec.spectrogram_bins, spec.spectrogram_columns],
        "frames_KCHW": [spec.frames_used, 3, spec.frame_px, spec.frame_px],
        "kind": manifest.kind,
        "ratios": manifest.ratios,
        "classes": manifest.classes,
        "feature_width": manifest.feature_width,
        "cpu_s": bounds.cpu_s,
        "memory_bytes": bounds.memory_bytes + bounds.per_file_byte * sum(file.size_bytes for file in manifest.files),
    }
    answer, complete = _ask_child(json.dumps(request), bounds.wall_s)
    if answer != "sound":
        raise Unfit(f"student {manifest.student_id} is refused: {answer}", final=complete)


def _ask_child(request: str, wall_s: float) -> tuple[str, bool]:
    """Return the child's answer, and whether the child came to its end. A busy machine may have ended it otherwise."""
    # -P: a folder called isthmus in the working directory must not be imported.
    command = [sys.executable, "-P", "-m", "isthmus.edge.student.trial"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(request.encode())
                child.stdin.close()
            child.wait(timeout=wall_s)
        except subprocess.TimeoutExpired:
            return f"it did not run through within {wall_s:g} s", False
        finally:
            child.kill()
        # The child writes one line at its end; a pipe holds more than is read here.
        answer = child.stdout.read(_OUTPUT_BYTES).decode(errors="replace").strip()
        if child.returncode == -signal.SIGXCPU:
            return "it needs too much processor time", False
    return (answer, True) if answer else (f"it ended its process (status {child.returncode})", False)


def _bound_memory(memory_bytes: int) -> None:
    """Bound what this process may allocate beyond what it has. Only Linux counts all of a process's data."""
    status = Path("/proc/self/status")
    if status.exists():
        kilobytes = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmData"))
        limit = kilobytes * 1024 + memory_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _manifest(request: dict[str, Any]) -> StudentManifest:
    unread = StudentFile("unread.onnx", 1, bytes(32))
    return StudentManifest(
        student_id="trial",
        kind=request["kind"],
        files=(unread,),
        ratios=tuple(request["ratios"]),
        classes=tuple(request["classes"]),
        input_spec_json="",
        feature_width=request["feature_width"],
        created_s=0.0,
    )


def _run(request: dict[str, Any], shield: Callable[[], None]) -> str:
    rng = np.random.default_rng(0)
    shapes = request["spectrogram_FT"], request["frames_KCHW"]
    silent, noisy = (
        (make(shapes[0]).astype(np.float32), make(shapes[1]).astype(np.float32))
        for make in (np.zeros, rng.standard_normal)
    )
    shield()
    try:
        check_student(Path(request["folder"]), _manifest(request), (silent, noisy))
    except Corrupt as error:
        return str(error)
    except MemoryError:
        return "it needs too much memory"
    except IsthmusError as error:
        return str(error)
    return "sound"


def main() -> None:
    """Be the child: read the request from standard input, write one line to standard output."""
    request = json.loads(sys.stdin.read())
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)

    def shield() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (request["cpu_s"], request["cpu_s"] + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _bound_memory(request["memory_bytes"])

    answer = _run(request, shield)
    print("".join(letter if letter.isprintable() else "?" for letter in answer)[:500], flush=True)


if __name__ == "__main__":
    main()
