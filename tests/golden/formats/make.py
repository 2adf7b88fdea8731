"""Make files of every persisted format with the installed version. ``test_formats.py`` opens them with later versions.

    python tests/golden/formats/make.py [--into FOLDER]

writes ``FOLDER/<version>/`` (default: beside this file) in about three minutes of processor time. Only the ``isthmus``
command makes files, and its options are an interface, so this script works with any version: put the checkout of that
version on PYTHONPATH. The README.md of a version is written by hand.

The networks are real, and a ResNet18 has 11 million weights. To keep the files small, the initial weights repeat a
few values (``REPEATING``) and the trunks have a learning rate of 0. The archive then stores 700 MB in 1.5 MB.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import lzma
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import grpc
import numpy as np
import pyarrow
import safetensors.numpy
from PIL import Image
from pyarrow import parquet

from isthmus import __version__
from isthmus.proto.v1 import elastic_pb2 as pb
from isthmus.proto.v1 import elastic_pb2_grpc as pb_grpc

PEOPLE = ("1001", "1002")
EMOTIONS = ("NEU", "HAP", "SAD")
TAKES = 6
PRIVATE = "1002"
RATIOS = (16.0, 64.0)
SIDE_PX = 16
TASK = {"name": "bright-dark", "classes": ["dark", "bright"], "class_of_label": [0, 1]}
LIMIT_S = 600.0

REPEATING = '''
"""Every process of the cloud loads this file: a new weight is filled by its initialiser and then repeats 31 values."""
import torch
from torch.nn import init

def repeating(fill):
    def filled(tensor, *args, **kwargs):
        fill(tensor, *args, **kwargs)
        with torch.no_grad():
            tensor.copy_(tensor.reshape(-1)[:31].repeat(-(-tensor.numel() // 31))[: tensor.numel()].view(tensor.shape))
        return tensor
    return filled

for name in ("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "uniform_", "normal_"):
    setattr(init, name, repeating(getattr(init, name)))
'''

PRESET = """
import dataclasses, sys
from isthmus.data.transforms import InputSpec
from isthmus.distill import recipes
from isthmus.cli import main

def formats(dataset, classes):
    base = recipes.smoke(dataset, classes)
    still = recipes.TrainConfig(epochs=1, batch_size=6, learning_rate=0.0, momentum=0.0, schedule="constant")
    heads = recipes.TrainConfig(epochs=40, batch_size=6, learning_rate=1e-2, schedule="constant", augment=False)
    teacher = dataclasses.replace(base.teacher, audio=still, visual=still, head=still, joint=still, held_out=0.4)
    personalise = dataclasses.replace(
        base.personalise, train=dataclasses.replace(still, epochs=2), rounds=2, samples_per_row=4, min_cluster=3
    )
    spec = InputSpec(
        spectrogram_bins=32, spectrogram_columns=32, frame_px=32, stored_px=36, frames_stored=2, frames_used=1
    )
    return dataclasses.replace(
        base, name="formats", input=spec, teacher_trunk="resnet18", teacher=teacher, all_distill=still,
        personalise=personalise, heads=heads, ratios=RATIOS,
    )

recipes.PRESETS["smoke"] = formats  # a name that every version takes
sys.exit(main(sys.argv[1:]))
"""


@dataclasses.dataclass(frozen=True)
class Workshop:
    """The folder in which everything is made. Commands run there."""

    folder: Path

    def environment(self, *, repeating: bool) -> dict[str, str]:
        paths = [str(self.folder / "repeating")] if repeating else []
        paths += [known for known in (os.environ.get("PYTHONPATH"),) if known]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}

    def run(self, *words: object, repeating: bool = False, preset: bool = False) -> str:
        """Run an ``isthmus`` command to its end and return what it printed. Raises CalledProcessError."""
        start = ["-c", PRESET.replace("RATIOS", repr(RATIOS))] if preset else ["-m", "isthmus.cli"]
        print("isthmus", *words, flush=True)
        done = subprocess.run(
            [sys.executable, *start, *map(str, words)],
            cwd=self.folder,
            env=self.environment(repeating=repeating),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=LIMIT_S,
        )
        return done.stdout

    def start(self, *words: object, repeating: bool = False) -> "subprocess.Popen[bytes]":
        print("isthmus", *words, "&", flush=True)
        return subprocess.Popen(
            [sys.executable, "-m", "isthmus.cli", *map(str, words)],
            cwd=self.folder,
            env=self.environment(repeating=repeating),
        )

    @contextlib.contextmanager
    def cloud(self, *words: object) -> Iterator[str]:
        """Run a server on ``cloud/``, yield its address, and stop it by SIGTERM."""
        port_file = self.folder / "port"
        port_file.unlink(missing_ok=True)
        serve = ["cloud", "serve", "--release", "release", "--state", "cloud", "--port-file", "port"]
        elastic = ["--elastic-model", "elastic/model.safetensors", "--elastic-pixels", "half"]
        process = self.start(*serve, *elastic, "--elastic-profile", "elastic/profile.json", *words, repeating=True)
        try:
            wait_for(port_file.exists, "the server's address", process)
            yield port_file.read_text().strip()
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(LIMIT_S)

    def keep(self, source: str, name: str) -> None:
        """Copy a folder as it is now to ``kept/<name>``."""
        shutil.copytree(self.folder / source, self.folder / "kept" / name, symlinks=True)

    def jobs(self) -> list[list[str]]:
        """Return the rows of ``isthmus cloud jobs``: id, device, stage, round, progress, ..."""
        return [line.split("\t") for line in self.run("cloud", "jobs", "--state", "cloud").splitlines()]


def wait_for(true: Callable[[], bool], what: str, process: "subprocess.Popen[bytes] | None" = None) -> None:
    """Wait until ``true`` returns True. Raises TimeoutError, or RuntimeError if ``process`` ends before."""
    until_s = time.monotonic() + LIMIT_S
    while not true():
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"{what} did not come: the process ended with {process.returncode}")
        if time.monotonic() > until_s:
            raise TimeoutError(f"{what} did not come within {LIMIT_S:.0f} s")
        time.sleep(0.1)


def write_clips(root: Path) -> None:
    """Write clips of half a second, each a tone and coloured noise, in CREMA-D's layout."""
    rng = np.random.default_rng(0)
    for folder in ("AudioWAV", "VideoFlash"):
        (root / folder).mkdir(parents=True)
    for person in PEOPLE:
        for index, emotion in enumerate(EMOTIONS):
            for take in range(TAKES):
                name = f"{person}_A{take:02}_{emotion}_XX"
                tone_T = 0.3 * np.sin(np.arange(4_000) * (0.1 + 0.2 * index + 0.01 * take))
                sound_T = np.int16(32_000 * np.clip(tone_T + 0.02 * rng.standard_normal(4_000), -1, 1))
                with wave.open(str(root / "AudioWAV" / f"{name}.wav"), "wb") as file:
                    file.setparams((1, 2, 8_000, 0, "NONE", ""))
                    file.writeframes(sound_T.tobytes())
                with av.open(str(root / "VideoFlash" / f"{name}.flv"), "w", options={"fflags": "+bitexact"}) as video:
                    stream = video.add_stream("flv1", rate=12)
                    stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
                    for _ in range(6):
                        picture = rng.integers(0, 60, (32, 32, 3), np.uint8) + np.uint8(60 * index)
                        video.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                    video.mux(stream.encode(None))


def make_release(at: Workshop) -> None:
    at.run("data", "split", "clips", "--actor", PRIVATE, "--output", "split.json")
    teacher = ["--data", "clips", "--release", "release", "--private-actors", PRIVATE, "--preset", "smoke"]
    at.run("distill", "teacher", *teacher, repeating=True, preset=True)
    at.run("distill", "student", "--release", "release", repeating=True)
    at.run("distill", "evaluate", "--release", "release", "--data", "clips", "--out", "evaluation.json")


def make_elastic(at: Workshop) -> None:
    """Make a ViT of two layers, a task for it, schedules, a profile and warmed models."""
    folder = at.folder / "elastic"
    folder.mkdir()
    safetensors.numpy.save_file(vit_weights(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_args": {"num_heads": 1}}))  # 0.1.0.dev0 did not read it
    (folder / "bright-dark.task.json").write_text(json.dumps(TASK))
    rng, rows = np.random.default_rng(0), []
    for label in [0, 1] * 20:
        picture = rng.integers(0, 100, (SIDE_PX, SIDE_PX, 3), np.uint8) + np.uint8(120 * label)
        rows.append({"image": {"bytes": png(picture), "path": None}, "label": label})
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "pictures.parquet")
    for name, row in zip(("dark", "bright"), rows, strict=False):
        (folder / f"{name}.png").write_bytes(row["image"]["bytes"])

    model = ["--model", "elastic/model.safetensors", "--pixels", "half", "--threads", 1, "--device", "cpu"]
    data = ["--data", "elastic/pictures.parquet"]
    task = ["--task", "elastic/bright-dark.task.json"]
    prompts = ["--gammas", "1,2", "--measured=-4,0", "--epochs", 2, "--out", "elastic/tasks"]
    at.run("elastic", "prompts", *model, *data, *task, *prompts)
    tasks = ["--tasks", "elastic/tasks"]
    schedules = "elastic/schedules.json"
    at.run("elastic", "schedules", *model, *data, *tasks, "--gammas=-4", "--evaluations", 4, "--out", schedules)
    sizes = ["--gammas=-4,0,2", "--sizes", "1,4", "--repeats", 1, "--number-type", "float32"]
    profile = ["--schedules", schedules, "--out", "elastic/profile.json"]
    at.run("elastic", "profile", *model, *data, *tasks, *sizes, *profile)
    warmed = ["--numbers", "0,4,8", "--middle", 4, "--epochs", 1, "--batch-size", 8, "--learning-rate", 0.001]
    out = ["--out", "elastic/warmup", "--vanilla-epochs", 2]
    at.run("elastic", "warmup", "run", *model, *data, *task, *warmed, *out)
    at.run("elastic", "warmup", "ensemble", *model, *data, *task, *warmed, *out)
    grid = ["--trace", "synthetic", "--loads", 1, "--seeds", 0, "--duration-s", 1, "--policies", "priced,clipper"]
    at.run("experiment", "elastic", "--profile", "elastic/profile.json", *grid, "--out", "elastic/experiment")
    for drawn in [*folder.rglob("*.png")]:
        if drawn.stem not in ("dark", "bright"):
            drawn.unlink()


def vit_weights(width: int = 64, layers: int = 2, hidden: int = 32, patch_px: int = 4) -> dict[str, Any]:
    """Return random weights of a ViT for two classes, under timm's names."""
    tokens = 1 + (SIDE_PX // patch_px) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, patch_px, patch_px),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (2, width),
        "head.bias": (2,),
    }
    for layer in range(layers):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", hidden, width),
            ("mlp.fc2", width, hidden),
        ):
            shapes |= {f"blocks.{layer}.{name}.weight": (rows, columns), f"blocks.{layer}.{name}.bias": (rows,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{layer}.{name}.weight": (width,), f"blocks.{layer}.{name}.bias": (width,)}
    rng = np.random.default_rng(0)
    scaled = {name: 0.1 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return {name: value + ("norm" in name and name.endswith("weight")) for name, value in scaled.items()}


def png(picture_HWC: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture_HWC).save(file, "PNG")
    return file.getvalue()


def answers(address: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the server's answers to the two pictures."""
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.ElasticServiceStub(channel)
        return {
            name: {"class": reply.class_name, "logits": list(reply.logits), "gamma": reply.gamma}
            for name in ("dark", "bright")
            for reply in [
                stub.MakeQuery(
                    pb.MakeQueryRequest(task="bright-dark", encoded=(folder / f"{name}.png").read_bytes(), latency_s=60)
                )
            ]
        }


def make_devices(at: Workshop) -> dict[str, Any]:
    """Run two devices with their cloud, and return what the test expects.

    The first device is kept twice: killed while its prototypes wait in the outbox, and at its end. The second is kept
    as it was killed while the cloud waits for the prototypes of the second round.
    """
    clips = ["--data", "clips", "--actor", PRIVATE, "--seed", 3]

    def run_at(address: str, name: str, rounds: int) -> list[object]:
        device = ["edge", "run", "--cloud", address, "--state", name, "--name", name, "--rounds", rounds]
        return [*device, *clips, "--once"]

    with at.cloud("--workers", 0) as address:
        at.run("edge", "prototypes", "--cloud", address, "--state", "first", "--name", "first", *clips)
    killed = at.start(*run_at(address, "first", 1))  # no server listens there any more
    wait_for(lambda: waiting_in(at.folder / "first"), "prototypes in the outbox", killed)
    killed.kill()
    killed.wait()
    at.keep("first", "device-uploading")

    expected: dict[str, Any] = {}
    with at.cloud() as address:
        at.run("elastic", "register", "elastic/tasks/bright-dark.json", "--server", address)
        expected["elastic"] = answers(address, at.folder / "elastic")
        at.run(*run_at(address, "first", 1), "--report", "first.json")
        again = ["--again", "--no-guard", "--report", "first-again.json"]
        at.run(*run_at(address, "first", 1), *again)
        at.keep("first", "device-serving")
        killed = at.start(*run_at(address, "second", 2))
        wait_for(lambda: phase(at.folder / "second") == "watch", "the second job", killed)
        killed.kill()
        killed.wait()
        wait_for(lambda: at.jobs()[-1][2] == "awaiting_prototypes", "the second job's first round")
    at.keep("second", "device-watching")
    expected["jobs"] = at.jobs()
    shown = at.run("edge", "prototypes", "--state", "first", *clips, "--json")
    (at.folder / "first.prototypes.json").write_text(shown)
    chosen = ["--prototypes", "first.prototypes.json", "--out", "selection.json"]
    at.run("distill", "select", "--release", "release", *chosen)
    status = at.run("edge", "status", "--state", "first", "--json")
    return {**expected, "status": json.loads(status)}


def waiting_in(state: Path) -> bool:
    file = state / "outbox.sqlite"
    if not file.is_file():
        return False
    with contextlib.closing(sqlite3.connect(file)) as outbox:
        try:
            return bool(outbox.execute("SELECT COUNT(*) FROM outbox").fetchone()[0])
        except sqlite3.OperationalError:
            return False


def phase(state: Path) -> str:
    try:
        return str(json.loads((state / "agent.json").read_text())["phase"])
    except FileNotFoundError:
        return ""


def pack(folder: Path, archive: Path) -> None:
    """Write a tar.xz of the folder, in which equal files are hard links. The same folder gives the same archive."""
    first: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            same = first.setdefault(f"{path.stat().st_mode} {digest_of(path)}", path)
            if same != path:
                path.unlink()
                os.link(same, path)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    with lzma.open(archive, "wb", filters=filters) as file, tarfile.open(fileobj=file, mode="w|") as tar:

        def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.uid = entry.gid = entry.mtime = 0
            entry.uname = entry.gname = ""
            return entry

        for path in sorted(folder.iterdir()):
            tar.add(path, path.name, filter=plain)


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make(into: Path, scratch: Path) -> None:
    at = Workshop(scratch)
    (scratch / "repeating").mkdir()
    (scratch / "repeating" / "sitecustomize.py").write_text(REPEATING)
    write_clips(scratch / "clips")
    at.run("data", "make", "crema-d", "synthetic", "--actors", 1, "--takes", 1, "--seed", 5)
    make_release(at)
    make_elastic(at)
    expected = make_devices(at)

    kept = scratch / "kept"
    for name in ("cloud", "release"):
        at.keep(name, name)
    for drawn in kept.rglob("*.png"):
        drawn.unlink()
    for path in sorted((scratch / "clips").rglob(f"{PRIVATE}_*")):
        copy = kept / path.relative_to(scratch)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    expected["students"] = {
        str(path.relative_to(kept / "cloud" / "artefacts")): digest_of(path)
        for path in sorted((kept / "cloud" / "artefacts").rglob("*"))
        if path.is_file()
    }
    out = into / __version__
    shutil.rmtree(out / "elastic", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    shutil.move(scratch / "elastic" / "warmup", kept / "warmup")  # a hundred files of a few hundred bytes
    shutil.copytree(scratch / "elastic", out / "elastic")
    for name in ("split", "evaluation", "selection", "first", "first-again", "first.prototypes"):
        shutil.copy(scratch / f"{name}.json", out / f"{name}.json")
    shutil.copy(scratch / "synthetic" / "synthetic.json", out / "synthetic.json")
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    pack(kept, out / "loop.tar.xz")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=Path(__file__).parent)
    parser.add_argument("--scratch", type=Path, help="an empty folder to work in, which is kept")
    asked = parser.parse_args()
    if asked.scratch is not None:
        make(asked.into, asked.scratch.resolve())
    else:
        with tempfile.TemporaryDirectory() as made:
            make(asked.into, Path(made))
