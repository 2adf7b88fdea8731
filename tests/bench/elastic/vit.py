"""Speed of the elastic ViT by gamma and batch size, interleaved with timm eager, timm compiled and ONNX Runtime.

Floor: the operations of all matrix products, divided by the measured rate of a square float32 product. The table also
shows the achieved share of the expected speed-up: the ratio of times at gamma 0 and at gamma, divided by the ratio of
operations. Weights of a timm name are random: speed does not depend on them, and accuracy is not measured.

With ``--parts``, a second table shows in the same run which part of our model takes the time.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
import typer
from torch import Tensor, nn

from isthmus.cloud.elastic.model import attention as attention_module
from isthmus.cloud.elastic.model import reducer as reducer_module
from isthmus.cloud.elastic.model import vit as vit_module
from isthmus.cloud.elastic.model.int8 import Int8Linear
from isthmus.cloud.elastic.model.runner import DTYPES, ElasticRunner, NumberType
from isthmus.cloud.elastic.model.timm_import import PatchEmbed
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import load_vit
from isthmus.cloud.elastic.prepare.precision import NUMBER_TYPES
from isthmus.cloud.elastic.prepare.profiler import blank_weights
from isthmus.data.images import PixelSpec
from tests.bench import THREADS, machine
from tests.bench.harness import Report, Spread, interleaved, shown

SIDE = 1_024
RIVALS = ("timm eager", "timm compiled", "ONNX Runtime")


def main(
    model: Annotated[
        str, typer.Option(help="A timm name (random weights) or a safetensors file.")
    ] = "vit_base_patch16_224",
    batches: Annotated[str, typer.Option(help="Separated by commas.")] = "1,8,32",
    gammas: Annotated[str, typer.Option(help="Separated by commas.")] = "-20,-15,-10,-5,0,2,4,8",
    number_types: Annotated[
        str,
        typer.Option(help="Number types, separated by commas. auto: float32 and those with a faster product."),
    ] = "auto",
    rivals: Annotated[
        str, typer.Option(help="Some of timm eager, timm compiled, ONNX Runtime, separated by commas.")
    ] = ",".join(RIVALS),
    compiled: Annotated[bool, typer.Option(help="Also measure our model compiled; compiling takes minutes.")] = False,
    parts: Annotated[bool, typer.Option(help="Also show which part of our model takes the time.")] = False,
    repeats: int = 7,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Time our model by gamma, number type and batch size, and timm and ONNX Runtime in float32."""
    torch.set_num_threads(THREADS)
    chosen = _words(rivals)
    if not set(chosen) <= set(RIVALS):
        raise typer.BadParameter(f"rivals: some of {', '.join(RIVALS)}")
    rates = {
        "float32": machine.product_rate(np.float32),
        "bfloat16": _product_rate(nn.Linear(SIDE, SIDE).bfloat16(), torch.bfloat16),
        "int8": _product_rate(Int8Linear(nn.Linear(SIDE, SIDE)), torch.float32),
    }
    types = [name for name in NUMBER_TYPES if rates[name] >= rates["float32"]]
    if number_types != "auto":
        types = [name for name in NUMBER_TYPES if name in _words(number_types)]
    config = {
        "model": Path(model).name,
        "batches": _numbers(batches),
        "gammas": _numbers(gammas),
        "number_types": types,
        "compiled": compiled,
        "repeats": repeats,
    }
    report = Report("elastic_vit", config, ("torch", "timm", "onnxruntime"))
    report.floors = {f"{name} product, operations/s": rate for name, rate in rates.items()}
    for batch in _numbers(batches):
        _measure(report, model, batch, _numbers(gammas), types, chosen, compiled, repeats, rates, parts)
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "batch": lambda row: str(row["batch"]),
        "on": lambda row: str(row["engine"]),
        "gamma": lambda row: str(row["gamma"]),
        "CPU ms, median (quartiles)": lambda row: shown(row["cpu_s"], 1e3),
        "images/CPU s": lambda row: f"{row['batch'] / row['cpu_s']['median']:.4g}",
        "Gop": lambda row: f"{row['operations'] / 1e9:.2f}",
        "times the floor": lambda row: f"{row['times_floor']:.2f}",
        "of the promised speed-up": lambda row: "" if row["of_promised"] is None else f"{row['of_promised']:.3f}",
        "times the best rival": lambda row: "" if row["over_rival"] is None else f"{row['over_rival']:.2f}",
    }
    if parts:
        for row in report.rows:
            if row.get("parts_s"):
                shares = ", ".join(f"{name} {1e3 * took['median']:.3g}" for name, took in row["parts_s"].items())
                report.notes.append(f"{row['engine']}, batch {row['batch']}, gamma {row['gamma']}, CPU ms: {shares}")
    report.finish(columns, out)


def _measure(
    report: Report,
    source: str,
    batch: int,
    gammas: list[int],
    number_types: list[NumberType],
    rivals: list[str],
    compiled: bool,
    repeats: int,
    rates: dict[str, float],
    parts: bool,
) -> None:
    """One batch size."""
    runs: dict[str, Callable[[], object]] = {}
    meant: dict[str, tuple[str, int | None, str]] = {}  # engine, gamma, number type
    model = ElasticViT(load_vit(source, random=True))
    images_BCHW = torch.randn(batch, 3, model.image_px, model.image_px)
    for name in number_types:
        for compiler in (None, "inductor") if compiled and name != "int8" else (None,):
            engine = f"ours, {name}" + (", compiled" if compiler else "")
            runner = _ours(source, name, compiler)
            report.notes.append(f"{engine}, batch {batch}: attention {runner.model.mixing}")
            for gamma in gammas:
                key = f"{engine}, {gamma}"
                runs[key] = _run(runner, gamma, images_BCHW.to(DTYPES[name]))
                meant[key] = (engine, gamma, name)
    with tempfile.TemporaryDirectory() as folder:
        for rival in rivals:
            runs[rival] = _rival(rival, load_vit(source, random=True), images_BCHW, Path(folder))
            meant[rival] = (rival, None, "float32")
        timings = interleaved(runs, repeats=repeats, warmups=2)
    parts_s = _parts({key: run for key, run in runs.items() if key not in rivals}, repeats) if parts else {}
    took_s = {key: timing.cpu_s.median for key, timing in timings.items()}
    best_rival_s = min((took_s[rival] for rival in rivals), default=None)
    for key, (engine, gamma, name) in meant.items():
        operations = batch * model.operations(gamma or 0, "append")
        zero = took_s.get(f"{engine}, 0")
        promised = None if gamma is None else batch * model.operations(0) / operations
        gained = None if zero is None else zero / took_s[key]
        report.rows.append(
            {
                "batch": batch,
                "engine": engine,
                "gamma": "" if gamma is None else gamma,
                **timings[key].to_json(),
                "parts_s": {name: spread.to_json() for name, spread in parts_s.get(key, {}).items()},
                "operations": operations,
                "times_floor": took_s[key] / (operations / rates[name]),
                "of_promised": None if promised is None or gained is None else gained / promised,
                "over_rival": best_rival_s / took_s[key] if gamma == 0 and best_rival_s else None,
            }
        )


def _ours(source: str, number_type: NumberType, compiler: str | None) -> ElasticRunner:
    """Return our model, as it is served."""
    model = ElasticViT(load_vit(source, random=True))
    pixels = PixelSpec(model.image_px, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return ElasticRunner(model, pixels, number_type=number_type, compiler=compiler, packed=True)


def _run(runner: ElasticRunner, gamma: int, images_BCHW: Tensor) -> Callable[[], object]:
    """Return features at ``gamma``, with prompts if it is above 0."""
    prompts = None
    if gamma > 0:
        prompts = runner.prepare(blank_weights(runner.model, [gamma])).prompts[gamma][None]
    return lambda: runner.features(images_BCHW, gamma, prompts, "append" if gamma > 0 else None)


def _parts(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, Spread]]:
    """Return CPU seconds by part of the model for each of ``runs``, which take turns."""
    took_s: dict[str, dict[str, list[float]]] = {key: defaultdict(list) for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            with _watched() as parts_s:
                began_s = time.process_time()
                run()
                whole_s = time.process_time() - began_s
            for name, part_s in {**parts_s, "all else": whole_s - sum(parts_s.values())}.items():
                took_s[key][name].append(part_s)
    return {key: {name: Spread.of(each) for name, each in parts.items()} for key, parts in took_s.items()}


@contextmanager
def _watched() -> Iterator[dict[str, float]]:
    """Add up the CPU seconds of the parts of every model that runs inside. A part inside another counts once."""
    taken_s: dict[str, float] = defaultdict(float)
    inside_s = [0.0]

    def timed(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            inside_s.append(0.0)
            began_s = time.process_time()
            try:
                return run(*given, **named)
            finally:
                whole_s = time.process_time() - began_s
                taken_s[name] += whole_s - inside_s.pop()
                inside_s[-1] += whole_s

        return call

    watched = (
        (vit_module, "attend", "output projection"),
        (attention_module, "project", "queries, keys and values"),
        (attention_module, "mixed", "attention"),
        (vit_module, "_feed_forward", "MLP"),
        (reducer_module, "match", "matching"),
        (reducer_module, "merge", "merging"),
        (nn.LayerNorm, "forward", "norms"),
        (PatchEmbed, "forward", "patches"),
    )
    patches = [mock.patch.object(at, name, timed(part, getattr(at, name))) for at, name, part in watched]
    for patch in patches:
        patch.start()
    try:
        yield taken_s
    finally:
        for patch in patches:
            patch.stop()


def _rival(name: str, vit: nn.Module, images_BCHW: Tensor, folder: Path) -> Callable[[], object]:
    if name == "ONNX Runtime":
        path = folder / "vit.onnx"
        with torch.inference_mode():
            torch.onnx.export(vit, (images_BCHW,), str(path), input_names=["images"], opset_version=18, dynamo=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feed: dict[str, npt.NDArray[np.float32]] = {"images": images_BCHW.numpy()}
        return lambda: session.run(None, feed)
    run: Callable[[Tensor], Tensor] = torch.compile(vit, dynamic=False) if name == "timm compiled" else vit

    def on_torch() -> Tensor:
        with torch.inference_mode():
            return run(images_BCHW)

    return on_torch


@torch.inference_mode()
def _product_rate(linear: nn.Module, dtype: torch.dtype) -> float:
    """Return operations per CPU second of a square layer. Int8 includes quantising the input."""
    inputs = torch.randn(SIDE, SIDE).to(dtype)
    timings = interleaved({"product": lambda: linear(inputs)}, repeats=5)
    return 2 * SIDE**3 / timings["product"].cpu_s.median


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    typer.run(main)
