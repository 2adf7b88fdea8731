"""What a machine with a GPU shows in less than ten minutes: ``python -m tests.bench.gpu --out gpu.json``.

Six steps, each a process with a time limit of its own: the tests that need a GPU, a profile of ViT-B/16 with random
weights, a task learned, its profile, a replay through a running server, and the demo, which personalises two devices.
A step that fails is recorded with its last words, and the next one runs. The result file is written after every step,
so what was measured is kept if the machine goes away.

``--small`` is for trying it on a processor. Without ``--model`` and ``--data``, the task is to tell bright pictures
from dark ones, with a ViT of random weights; the replay then says how fast, not how accurate.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer

from isthmus.data.files import write_atomically
from isthmus.data.images import LabelledImages, write_images
from isthmus.demo.processes import ChildFailed, Family
from tests.bench import machine, vit32

CLI: Final = (sys.executable, "-m", "isthmus.cli")
BRIGHT_DARK: Final = {"name": "bright-dark", "classes": ["dark", "bright"], "class_of_label": [0, 1]}
TEXT_CHARS: Final = 3_000
SERVER_START_S: Final = 120.0


@dataclass
class Session:
    """The result so far, and the time that is left."""

    out: Path
    budget_s: float
    result: dict[str, Any]
    began_s: float = field(default_factory=time.monotonic)

    def left_s(self) -> float:
        return self.budget_s - (time.monotonic() - self.began_s)

    def run(self, name: str, argv: Sequence[object], limit_s: float) -> bool:
        """Run a step for at most ``limit_s``. Returns whether it succeeded."""
        return self.record(name, lambda: _ran([str(each) for each in argv], min(limit_s, self.left_s())))

    def record(self, name: str, step: Callable[[], dict[str, Any]]) -> bool:
        """Record the result of a step, its time, and the error that it ended with."""
        began_s = time.monotonic()
        print(f"{name} ...", flush=True)
        found: dict[str, Any] = {"ok": False}
        try:
            found = {"ok": True, **step()}
        except subprocess.TimeoutExpired as error:
            found["error"] = f"not done after {error.timeout:.0f} s"
        except subprocess.CalledProcessError as error:
            found["error"] = f"code {error.returncode}"
            found["last_words"] = (error.output or "")[-TEXT_CHARS:]
        except (ChildFailed, OSError, ValueError) as error:
            found["error"] = str(error)
        found["took_s"] = round(time.monotonic() - began_s, 1)
        self.result["steps"][name] = found
        self.result["took_s"] = round(time.monotonic() - self.began_s, 1)
        write_atomically(self.out, json.dumps(self.result, indent=1) + "\n")
        print(f"{name}: {'done' if found['ok'] else found['error']} in {found['took_s']} s", flush=True)
        return bool(found["ok"])


def _ran(argv: list[str], limit_s: float) -> dict[str, Any]:
    if limit_s <= 0:
        raise subprocess.TimeoutExpired(argv, 0)
    done = subprocess.run(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit_s, check=True
    )
    return {"last_words": done.stdout[-TEXT_CHARS:]}


def main(
    out: Annotated[Path, typer.Option(help="Result file (JSON). Files of the steps go to a folder beside it.")],
    model: Annotated[Path | None, typer.Option(help="The CIFAR-10 ViT (safetensors).")] = None,
    data: Annotated[Path | None, typer.Option(help="CIFAR-10's training pictures (Parquet).")] = None,
    test: Annotated[Path | None, typer.Option(help="CIFAR-10's test pictures (Parquet), for the replay.")] = None,
    small: Annotated[bool, typer.Option("--small", help="Short steps, to try the script on a processor.")] = False,
    device: Annotated[str, typer.Option(help="cuda, cpu or auto.")] = "auto",
    budget_s: Annotated[float, typer.Option(help="Steps that would begin later are left out.")] = 570.0,
) -> None:
    """Run all steps, and leave a result file."""
    if len({model is None, data is None, test is None}) > 1:
        raise typer.BadParameter("--model, --data and --test go together")
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    facts = {**machine.facts(("torch", "timm", "grpcio")), "gpu": gpu, "cuda": torch.version.cuda}
    session = Session(out, budget_s, {"machine": facts, "small": small, "device": device, "steps": {}})

    tests = ("tests/unit/cloud/elastic/model/test_on_gpu.py", "tests/unit/cloud/elastic/scheduling/test_profile.py")
    session.run("tests", [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], 240)
    sizes, gammas, repeats = ("1", "0", 1) if small else ("1,8,64,256", "-20,-10,0,4", 5)
    vit_b = folder / "vit-b.json"
    profile_of = [*CLI, "elastic", "profile", "--device", device]
    of_vit_b = ["--model", "vit_base_patch16_224", "--random", f"--gammas={gammas}", "--sizes", sizes]
    of_vit_b += ["--repeats", str(repeats), "--number-type", "float32" if small else "auto", "--out", str(vit_b)]
    session.run("profile of ViT-B/16", [*profile_of, *of_vit_b], 180)
    if vit_b.exists():
        session.result["vit_b_profile"] = json.loads(vit_b.read_text(encoding="utf-8"))

    task = "cifar10"
    if model is None or data is None or test is None:
        task = str(folder / "bright-dark.json")
        Path(task).write_text(json.dumps(BRIGHT_DARK), encoding="utf-8")
        model, data, test = folder / "vit.safetensors", folder / "train.parquet", folder / "test.parquet"
        vit32.save_vit(model)
        write_images(data, bright_and_dark(200, 0))
        write_images(test, bright_and_dark(100, 1))
    tasks, profile = folder / "tasks", folder / "profile.json"
    common = ["--model", str(model), "--pixels", "cifar10", "--device", device, "--data", str(data)]
    learning = ["--task", task, "--out", str(tasks), "--gammas", "2", "--measured=-16,0", "--epochs", "1"]
    learning += ["--limit", "200" if small else "10000"]
    learned = session.run("a task learned", [*CLI, "elastic", "prompts", *common, *learning], 150)
    measuring = ["--tasks", str(tasks), "--limit", "200" if small else "5000", "--gammas=-16,-8,0,2"]
    measuring += ["--sizes", "1,8,32" if small else "1,8,64", "--out", str(profile)]
    measuring += ["--number-type", "float32", "--repeats", "1"] if small else []
    measured = learned and session.run("its profile", [*CLI, "elastic", "profile", *common, *measuring], 120)
    if measured:
        session.result["profile"] = json.loads(profile.read_text(encoding="utf-8"))
        session.record("replay", lambda: replayed(folder, model, tasks, profile, test, device, 5 if small else 30))
    demo = folder / "demo"
    if session.run("personalisation", [*CLI, "demo", "--preset", "tiny" if small else "smoke", "--out", demo], 420):
        session.result["demo"] = json.loads((demo / "result.json").read_text(encoding="utf-8"))
    write_atomically(out, json.dumps(session.result, indent=1) + "\n")
    failed = [name for name, step in session.result["steps"].items() if not step["ok"]]
    print(f"written: {out}; {session.result['took_s']:.0f} s" + (f"; failed: {', '.join(failed)}" if failed else ""))
    if failed:
        raise typer.Exit(1)


def replayed(
    folder: Path, model: Path, tasks: Path, profile: Path, test: Path, device: str, seconds: int
) -> dict[str, Any]:
    """Serve the task and replay the synthetic trace through gRPC. Returns the figures of the replay."""
    with Family(folder / "logs") as family:
        port, out = folder / "port", folder / "replay.json"
        port.unlink(missing_ok=True)
        serve = [*CLI, "cloud", "serve", "--listen", "127.0.0.1:0", "--state", folder / "state", "--port-file", port]
        serve += ["--elastic-model", model, "--elastic-pixels", "cifar10", "--elastic-profile", profile]
        serve += ["--elastic-device", device]
        server = family.start("server", [str(each) for each in serve])
        address = family.wait_for_address(server, port, SERVER_START_S)
        for path in sorted(tasks.glob("*.recipe.json")):
            description = tasks / f"{path.name.removesuffix('.recipe.json')}.json"
            _ran([*CLI, "elastic", "register", str(description), "--server", address], 60)
        asked = ["elastic", "replay", "--server", address, "--profile", profile, "--tasks", tasks, "--data", test]
        asked += ["--duration-s", seconds, "--seed", 200, "--out", out]
        return {**_ran([*CLI, *map(str, asked)], 150), "figures": json.loads(out.read_text(encoding="utf-8"))}


def bright_and_dark(count: int, seed: int) -> LabelledImages:
    """Make random pictures, dark and bright in turn."""
    rng = np.random.default_rng(seed)
    labels_N = np.arange(count) % 2
    side = vit32.SIDE
    pictures_NHWC = (
        rng.integers(0, 100, (count, side, side, 3), np.uint8) + (150 * labels_N).astype(np.uint8)[:, None, None, None]
    )
    return LabelledImages(pictures_NHWC, labels_N.astype(np.int64))


if __name__ == "__main__":
    typer.run(main)
