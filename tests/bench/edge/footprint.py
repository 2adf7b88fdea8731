"""Footprint of a device: memory of the process that encodes, of a live device, its idle load, and the installation.

The device's environment (``make install-edge``) runs ``isthmus.edge.student.encoder``, like ``isthmus edge``. The same
networks in torch eager are measured for comparison. A live device has everything loaded that ``isthmus edge run``
loads, a film as its camera and a sound file as its microphone; its capturing child is counted with it. Resident memory
(Rss) counts a page that both processes share twice; proportional memory (Pss) counts it once. Before memory is
measured, the system forgets the environment's files, as after a start of the machine: right after an installation they
lie in its cache in larger pieces, and a process then maps up to twice as much of them.

If there is no environment at ``--edge-python``, one is made with pip in a temporary folder. Sizes are those of the
installed files without pip and setuptools. Torch's size is that of the CPU build with its requirements; a CUDA build is
several times larger.
"""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Annotated, Any

import typer

from tests.bench import machine
from tests.bench.harness import Report
from tests.bench.untrained import encoders_release, export_base
from tests.rigs.edge.scene import write_empty_room, write_scene

TORCH = ("torch", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec", "typing_extensions")
"""torch and its requirements without numpy, which both environments need."""

BOARD = tuple(f"manylinux_2_{glibc}_aarch64" for glibc in (17, 27, 28, 34))
"""Raspberry Pi OS 12 has glibc 2.36."""

_OF_PIP = ("pip", "setuptools", "_distutils_hack", "pkg_resources")

ON_THE_DEVICE = """
import json, sys
from pathlib import Path
import numpy as np
from isthmus.data.transforms import InputSpec
from isthmus.edge.commands.edge import app
from isthmus.edge.student.encoder import StudentEncoder
from isthmus.edge.agent.report import rss_bytes
assert "torch" not in sys.modules
seen = {"imported": rss_bytes()}
spec = InputSpec.from_json(sys.argv[2])
encoder = StudentEncoder(Path(sys.argv[1]))
for _ in range(10):
    features = encoder.features(
        np.zeros((spec.spectrogram_bins, spec.spectrogram_columns), np.float32),
        np.zeros((spec.frames_used, 3, spec.frame_px, spec.frame_px), np.float32),
    )
    encoder.teacher_probabilities([features])
    encoder.local_probabilities(features)
    encoder.compress(features, float(sys.argv[3]))
print(json.dumps({**seen, "encoding": rss_bytes()}))
"""

IMPORTS = """
import importlib, json
from pathlib import Path

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

found, before = {}, resident()
for name in ("numpy", "cv2", "onnxruntime", "grpc", "isthmus.edge.commands.running"):
    importlib.import_module(name)
    found[name], before = resident() - before, resident()
print(json.dumps(found))
"""

LIVE = """
import json, os, subprocess, sys, time
from pathlib import Path
import numpy as np
from isthmus.data.clip import ClipRef, DecodedClip
from isthmus.data.transforms import InputSpec, spectrogram, stored_frame
from isthmus.edge.capture.gates import FaceGate, resampled, voice_by_energy
from isthmus.edge.capture.process import Capture
from isthmus.edge.capture.sources import Taken
from isthmus.edge.commands import running
from isthmus.edge.own_clips.prototypes import make_prototypes
from isthmus.edge.student.encoder import StudentEncoder, encode
base, spec, ratio, film, sound, empty, silence, clips, idle_s = sys.argv[1:]
spec, rng = InputSpec.from_json(spec), np.random.default_rng(0)

def memory(what, process):
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Rss:", "Pss:")):
            found[f"{what}, {line[:3]}"] = 1024 * int(line.split()[1])

def cpu_s(process):
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

def recorder():
    command = [sys.executable, "-P", "-m", "isthmus.edge.capture.recorder", film, sound, str(spec.sample_rate_hz)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

found = {}
encoder, gate = StudentEncoder(Path(base)), FaceGate()
with recorder() as child:
    child.stdout.read(3_000_000)  # so many bytes of pictures and sound have come
    for _ in range(int(clips)):
        pictures = rng.integers(0, 255, (30, 240, 320, 3), dtype=np.uint8)
        gate.faces(pictures[0])
        voice = rng.normal(0, 0.1, int(44_100 * spec.duration_s)).astype(np.float32)
        voice = resampled(voice, 44_100, spec.sample_rate_hz)
        voice_by_energy(voice, spec.sample_rate_hz)
        stored = np.stack([stored_frame(each, spec) for each in pictures[: spec.frames_stored]])
        taken = Taken(ClipRef("clip", None, None, None, None), DecodedClip(spectrogram(voice, spec), stored), 0.0)
        features = encode(encoder, taken, spec, time.monotonic).features
        encoder.local_probabilities(features)
        encoder.compress(features, float(ratio))
    memory("answering, device", "self")
    memory("answering, capturing child", child.pid)
    child.kill()
if float(idle_s):
    with Capture(spec, time.monotonic, lambda text: None, camera=empty, microphone=silence) as idle:
        idle.next_clip("opening")
        began_s, before_s = time.monotonic(), cpu_s("self") + cpu_s(idle._child.pid)
        while time.monotonic() < began_s + float(idle_s):
            idle.next_clip("nobody")
        found["idle share"] = (cpu_s("self") + cpu_s(idle._child.pid) - before_s) / (time.monotonic() - began_s)
make_prototypes(rng.dirichlet(np.ones(6), 24).astype(np.float32), seed=0)
memory("after k-means, device", "self")
print(json.dumps(found))
"""

IN_TORCH = """
import json, sys
from pathlib import Path
import torch
from isthmus.edge.agent.report import rss_bytes
from isthmus.distill.release import Release
torch.set_num_threads(1)
seen = {"imported": rss_bytes()}
release = Release.open(Path(sys.argv[1]))
student, spec = release.student(0), release.recipe.input
with torch.inference_mode():
    for _ in range(10):
        student.audio(torch.zeros(1, spec.spectrogram_bins, spec.spectrogram_columns))
        student.visual(torch.zeros(1, spec.frames_used, 3, spec.frame_px, spec.frame_px))
print(json.dumps({**seen, "encoding": rss_bytes()}))
"""


def printed_json(python: Path, code: str, *arguments: str) -> dict[str, float]:
    """Run ``code`` in a new process; return the JSON it prints. Raises RuntimeError with its last line if it fails."""
    command = [str(python), "-c", code, *arguments]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{python}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def site_packages(python: Path) -> Path:
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


def forget_pages(folder: Path) -> None:
    """Have the system drop the folder's files from its cache, except what a running process has mapped."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def folder_sizes(where: Path) -> dict[str, int]:
    """Return the bytes in a site-packages folder by first folder, without pip and setuptools."""
    sizes: dict[str, int] = {}
    for path in where.rglob("*"):
        first = path.relative_to(where).parts[0]
        if path.is_file() and not path.is_symlink() and not first.startswith(_OF_PIP):
            name = first.partition("-")[0].partition(".")[0]
            sizes[name] = sizes.get(name, 0) + path.stat().st_size
    return sizes


def board_sizes(folder: Path) -> dict[str, int]:
    """Return the bytes that the wheels of ``.[edge]`` for a 64-bit ARM board unpack to, by first folder.

    pip compiles no Python files of another machine's wheels; on the board that adds what ``--no-compile`` would spare.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), "."], cwd=machine.ROOT, check=True)
    project = tomllib.loads((machine.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["edge"]]
    command = [*pip, "download", "--only-binary", ":all:", "--python-version", "3.11", "--dest", str(folder)]
    command += [word for platform in BOARD for word in ("--platform", platform)]
    subprocess.run([*command, "-c", "constraints.txt", *wanted], cwd=machine.ROOT, check=True)
    sizes: dict[str, int] = {}
    for path in folder.glob("*.whl"):
        with zipfile.ZipFile(path) as wheel:
            sizes[path.name.partition("-")[0]] = sum(each.file_size for each in wheel.infolist())
    return sizes


def distribution_bytes(found: Distribution) -> int:
    paths = [Path(str(found.locate_file(file))) for file in found.files or ()]
    return sum(path.stat().st_size for path in paths if path.is_file())


def edge_environment(folder: Path) -> Path:
    """Make a new environment with ``.[edge]``; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "-c", "constraints.txt", ".[edge]"]
    subprocess.run(install, cwd=machine.ROOT, check=True)
    return python


def main(
    presets: Annotated[str, typer.Option(help="Separated by commas.")] = "small,thesis",
    edge_python: Annotated[Path, typer.Option(help="Python of the device's environment.")] = machine.ROOT
    / ".venv-edge/bin/python",
    clips: Annotated[int, typer.Option(help="Clips that the live device answers.")] = 3,
    idle_s: Annotated[float, typer.Option(help="Seconds of an empty room; 0 leaves it out.")] = 20.0,
    board: Annotated[
        bool, typer.Option(help="Also download the wheels of a 64-bit ARM board, for their size.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Measure resident memory and installed size of the device, against torch."""
    report = Report("footprint", {"presets": presets.split(",")}, ("onnxruntime", "torch"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = edge_python if edge_python.exists() else edge_environment(folder / "environment")
        where = site_packages(python)
        sizes = folder_sizes(where)
        largest = dict(sorted(sizes.items(), key=lambda item: -item[1])[:8])
        torch_bytes = sum(distribution_bytes(distribution(each)) for each in TORCH)
        edge_bytes = sum(sizes.values())
        report.rows.append({"what": "install, .[edge]", "bytes": edge_bytes, "of": largest})
        if board:
            (folder / "board").mkdir()
            parts = dict(sorted(board_sizes(folder / "board").items(), key=lambda item: -item[1]))
            of = dict([*parts.items()][:10])
            report.rows.append({"what": "wheels of .[edge] for aarch64", "bytes": sum(parts.values()), "of": of})
        report.rows.append({"what": "install, torch and what it requires, CPU build", "bytes": torch_bytes})
        forget_pages(where)
        for name, size in printed_json(python, IMPORTS).items():
            report.rows.append({"what": f"memory, import of {name} after the ones above", "bytes": size})
        film, sound = write_scene(folder)
        empty, silence = write_empty_room(folder)
        for preset in presets.split(","):
            release = encoders_release(folder / preset, preset)
            base = export_base(release)
            spec, ratio = release.recipe.input.to_json(), max(release.recipe.ratios)
            on_device = printed_json(python, ON_THE_DEVICE, str(base), spec, str(ratio))
            files = (film, sound, empty, silence)
            live = printed_json(python, LIVE, str(base), spec, str(ratio), *map(str, files), str(clips), str(idle_s))
            if "idle share" in live:
                report.rows.append({"what": f"idle, share of a core, {preset}", "share": live.pop("idle share")})
            for what, size in live.items():
                report.rows.append({"what": f"memory, live, {what}, {preset}", "bytes": size})
            in_torch = printed_json(Path(sys.executable), IN_TORCH, str(release.root))
            for what, memory in (("isthmus edge", on_device), ("torch eager", in_torch)):
                for stage, resident in memory.items():
                    report.rows.append({"what": f"memory, {what}, {stage}, {preset}", "bytes": resident})
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "what": lambda row: str(row["what"]),
        "MB": lambda row: f"{row['bytes'] / 1e6:.0f}" if "bytes" in row else f"{row['share']:.1%} of a core",
        "largest parts, MB": lambda row: ", ".join(
            f"{part} {size / 1e6:.0f}" for part, size in row.get("of", {}).items()
        ),
    }
    report.finish(columns, out)


if __name__ == "__main__":
    typer.run(main)
