"""Speed of the student's encoders on ONNX Runtime, float32 and int8, against torch eager: batch 1, one thread.

The floor is the operations of all convolutions (two for a multiply and an add), divided by the measured rate of a
square float32 matrix product. Int8 may be faster than this floor. Weights are random: speed does not depend on them,
and accuracy is not measured.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
import typer
from torch import Tensor, nn

from isthmus.data.transforms import InputSpec
from isthmus.distill.student.int8 import quantise_encoder
from isthmus.edge.student.encoder import AUDIO_ENCODER, VISUAL_ENCODER
from tests.bench import THREADS, machine
from tests.bench.harness import Report, interleaved, shown
from tests.bench.untrained import encoders_release, export_base

Float32s = npt.NDArray[np.float32]

CALIBRATION_BATCHES = 8


def one_clip(file: str, spec: InputSpec, rng: np.random.Generator) -> Float32s:
    """Return random input of the encoder in ``file``, standardised like real input."""
    shape = (
        (1, spec.spectrogram_bins, spec.spectrogram_columns)
        if file == AUDIO_ENCODER
        else (1, spec.frames_used, 3, spec.frame_px, spec.frame_px)
    )
    return rng.standard_normal(shape, np.float32)


def on_onnx_runtime(path: Path, clip: Float32s) -> Callable[[], object]:
    """Return a session with the options of the device."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.inter_op_num_threads = THREADS
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: clip}
    return lambda: session.run(None, feed)


def on_torch(encode: Callable[[Tensor], Tensor], clip: Float32s) -> Callable[[], object]:
    tensor = torch.from_numpy(clip)

    def run() -> Tensor:
        with torch.inference_mode():
            return encode(tensor)

    return run


def operations(module: nn.Module, run: Callable[[], object]) -> int:
    """Return the operations of all convolutions in one run."""
    counted = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal counted
        assert isinstance(layer, nn.Conv2d)
        counted += 2 * output.numel() * layer.weight[0].numel()

    hooks = [layer.register_forward_hook(count) for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    run()
    for hook in hooks:
        hook.remove()
    return counted


def main(
    presets: Annotated[str, typer.Option(help="Separated by commas.")] = "small,thesis",
    repeats: int = 30,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Time ONNX Runtime, float32 and int8, against torch eager and the operation count."""
    torch.set_num_threads(THREADS)
    config = {"presets": presets.split(","), "repeats": repeats, "batch": 1, "calibration": CALIBRATION_BATCHES}
    report = Report("encoder", config, ("torch", "onnxruntime", "onnx"))
    rate = machine.product_rate(np.float32)
    report.floors = {"float32 product, operations/s": rate}
    with tempfile.TemporaryDirectory() as folder:
        for preset in presets.split(","):
            measure_preset(report, Path(folder) / preset, preset, repeats, rate)
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "preset": lambda row: str(row["preset"]),
        "encoder": lambda row: str(row["encoder"]),
        "on": lambda row: str(row["engine"]),
        "CPU ms, median (quartiles)": lambda row: shown(row["cpu_s"], 1e3),
        "wall ms": lambda row: shown(row["wall_s"], 1e3),
        "Mop": lambda row: f"{row['operations'] / 1e6:.0f}",
        "times the float32 floor": lambda row: f"{row['times_floor']:.2f}",
        "times as fast as torch": lambda row: f"{row['speed_over_torch']:.2f}",
        "MB": lambda row: "" if row["file_bytes"] is None else f"{row['file_bytes'] / 1e6:.1f}",
    }
    report.finish(columns, out)


def measure_preset(report: Report, root: Path, preset: str, repeats: int, rate: float) -> None:
    release = encoders_release(root, preset)
    base, student, spec = export_base(release), release.student(0), release.recipe.input
    rng = np.random.default_rng(0)
    for file, encode in ((AUDIO_ENCODER, student.audio), (VISUAL_ENCODER, student.visual)):

        def calibration(name: str = file) -> Iterator[Float32s]:
            return (one_clip(name, spec, rng) for _ in range(CALIBRATION_BATCHES))

        clip = one_clip(file, spec, rng)
        int8 = quantise_encoder(base / file, root / f"int8_{file}", calibration())
        candidates = {
            "torch eager": on_torch(encode, clip),
            "ONNX Runtime float32": on_onnx_runtime(base / file, clip),
            "ONNX Runtime int8": on_onnx_runtime(int8, clip),
        }
        files = {"ONNX Runtime float32": base / file, "ONNX Runtime int8": int8}
        count = operations(student, candidates["torch eager"])
        timings = interleaved(candidates, repeats=repeats, warmups=3)
        torch_s = timings["torch eager"].cpu_s.median
        for engine, timing in timings.items():
            report.rows.append(
                {
                    "preset": preset,
                    "encoder": file.removesuffix("_encoder.onnx"),
                    "engine": engine,
                    **timing.to_json(),
                    "operations": count,
                    "times_floor": timing.cpu_s.median / (count / rate),
                    "speed_over_torch": torch_s / timing.cpu_s.median,
                    "file_bytes": files[engine].stat().st_size if engine in files else None,
                }
            )


if __name__ == "__main__":
    typer.run(main)
