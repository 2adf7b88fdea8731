"""Time of an encoder's training step by memory layout, and by how its threads wait on a machine with other work.

The floor is the operations of the convolutions (three times those of a forward pass), divided by the rate of a square
product. Weights and clips are random; speed depends on neither.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer
from torch import Tensor, nn

from isthmus.distill.models.trunk import Encoder
from isthmus.distill.recipes import PRESETS, Recipe
from isthmus.distill.training.loop import optimizer_for
from isthmus.experiments.personal.cells.pool import cores
from tests.bench import THREADS
from tests.bench.harness import Report, Spread, interleaved, shown
from tests.bench.machine import product_rate
from tests.bench.untrained import CLASSES

WAYS: Final[Mapping[str, tuple[int, Mapping[str, str]]]] = {
    "one thread": (1, {}),
    "one thread per core, waiting as OpenMP does": (cores(), {}),
    "one thread per core, asleep while they wait (isthmus)": (cores(), {"OMP_WAIT_POLICY": "passive"}),
}
"""Number of threads, and additions to the environment."""
_BUSY: Final = "import torch\na = torch.randn(600, 600)\nwhile True:\n    a @ a\n"


def step_of(encoder: Encoder, recipe: Recipe, frames_BCHW: Tensor) -> Callable[[], None]:
    """Return a whole step of the teacher's picture branch."""
    optimizer = optimizer_for(encoder, recipe.teacher.visual)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        encoder(frames_BCHW).square().mean().backward()
        optimizer.step()

    return step


def fresh(recipe: Recipe, *, channels_last: bool = False) -> Encoder:
    """Return the student's picture encoder; ``channels_last``: in that layout up to the last convolution."""
    torch.manual_seed(0)
    encoder = Encoder(recipe.student_trunk, 3, recipe.feature_width, neck=False)
    if channels_last:
        stage = encoder.trunk.get_submodule("layer4")
        stage._forward_pre_hooks.clear()
        stage.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return encoder


def batch_of(recipe: Recipe) -> Tensor:
    return torch.randn(recipe.teacher.visual.batch_size, 3, recipe.input.frame_px, recipe.input.frame_px)


def operations(encoder: Encoder, frames_BCHW: Tensor) -> float:
    """Return the operations of a step's convolutions: forward, and twice as many backward."""
    counted = 0

    def count(module: nn.Module, _: Any, out: Tensor) -> None:
        nonlocal counted
        assert isinstance(module, nn.Conv2d)
        counted += 2 * out.numel() * module.in_channels * int(np.prod(module.kernel_size))

    hooks = [each.register_forward_hook(count) for each in encoder.modules() if isinstance(each, nn.Conv2d)]
    with torch.no_grad():
        encoder(frames_BCHW)
    for hook in hooks:
        hook.remove()
    return 3.0 * counted


@contextmanager
def others(count: int) -> Iterator[None]:
    """Run ``count`` other processes, each of which multiplies matrices on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    busy = [subprocess.Popen([sys.executable, "-c", _BUSY], env=environment) for _ in range(count)]
    try:
        time.sleep(4 if count else 0)  # until they have loaded torch
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def seconds_a_step(preset: str, way: str, seconds: float) -> float:
    """Time steps in a new process, because OpenMP reads its waiting policy when it is loaded."""
    threads, waiting = WAYS[way]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [
        sys.executable,
        "-m",
        "tests.bench.distill.training",
        "--presets",
        preset,
        "--only-steps-for-s",
        str(seconds),
    ]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, env={**environment, **waiting}, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def measure_layouts(report: Report, preset: str, repeats: int) -> None:
    recipe = PRESETS[preset]("crema-d", CLASSES)
    frames_BCHW = batch_of(recipe)
    encoders = {"channels last throughout": fresh(recipe, channels_last=True), "isthmus": fresh(recipe)}
    floor_s = operations(encoders["isthmus"], frames_BCHW) / report.floors["product_rate"]
    timings = interleaved(
        {name: step_of(encoder, recipe, frames_BCHW) for name, encoder in encoders.items()}, repeats=repeats
    )
    for what, timing in timings.items():
        found = timing.to_json()["cpu_s"]
        row = {"preset": preset, "what": f"layout: {what}", "others": 0, "seconds": found, "seconds_are": "CPU"}
        report.rows.append({**row, "times_floor": timing.cpu_s.median / floor_s})


def measure_waiting(report: Report, preset: str, most_others: int, repeats: int, seconds: float) -> None:
    for count in range(most_others + 1):
        found_s: dict[str, list[float]] = {way: [] for way in WAYS}
        with others(count):
            for _ in range(repeats):
                for way in WAYS:
                    found_s[way].append(seconds_a_step(preset, way, seconds))
        for way, values in found_s.items():
            row = {"preset": preset, "what": way, "others": count, "seconds": Spread.of(values).to_json()}
            report.rows.append({**row, "seconds_are": "wall", "times_floor": None})


def main(
    presets: Annotated[
        str, typer.Option(help="Batch sizes, separated by commas; the first is also measured beside other processes.")
    ] = "smoke,small",
    repeats: int = 7,
    most_others: Annotated[
        int, typer.Option(help="Measure beside 0, 1, ... up to this many other busy processes.", min=0)
    ] = 2,
    each_s: Annotated[float, typer.Option(help="Seconds of steps per process that is timed beside others.")] = 8.0,
    only_steps_for_s: Annotated[float | None, typer.Option(hidden=True)] = None,
    threads: Annotated[int, typer.Option(hidden=True)] = THREADS,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Time training steps: layouts in CPU seconds on one thread, waiting policies in wall seconds."""
    chosen = presets.split(",")
    torch.set_num_threads(threads)
    if only_steps_for_s is not None:
        print(_median_step_s(chosen[0], only_steps_for_s))
        return
    config = {"presets": chosen, "repeats": repeats, "most_others": most_others, "each_s": each_s}
    report = Report("training", config, ("torch",))
    report.floors["product_rate"] = product_rate(np.float32)
    for preset in chosen:
        measure_layouts(report, preset, repeats)
    measure_waiting(report, chosen[0], most_others, max(1, repeats // 2), each_s)
    report.notes.append("The processes of column 'others' belong to this command.")
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "preset": lambda row: str(row["preset"]),
        "what": lambda row: str(row["what"]),
        "others": lambda row: str(row["others"]),
        "ms a step": lambda row: shown(row["seconds"], 1e3),
        "of": lambda row: str(row["seconds_are"]),
        "times the floor": lambda row: "" if row["times_floor"] is None else f"{row['times_floor']:.2f}",
    }
    report.finish(columns, out)


def _median_step_s(preset: str, seconds: float) -> float:
    recipe = PRESETS[preset]("crema-d", CLASSES)
    step = step_of(fresh(recipe), recipe, batch_of(recipe))
    step()
    took_s: list[float] = []
    ends_s = time.perf_counter() + seconds
    while not took_s or time.perf_counter() < ends_s:
        began_s = time.perf_counter()
        step()
        took_s.append(time.perf_counter() - began_s)
    return statistics.median(took_s)


if __name__ == "__main__":
    typer.run(main)
