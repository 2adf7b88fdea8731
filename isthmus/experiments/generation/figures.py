"""Pictures of the experiment: response time and goodput by policy and load, occupancy, waste, fairness, predictors,
placements. Each function turns cells into PNG bytes, without pyplot's global state.
"""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from isthmus.data.files import write_atomically
from isthmus.distill.figures import png
from isthmus.experiments.generation.cells import GOALS, PREDICTORS, PREFIXES, SYSTEM_TOKENS
from isthmus.experiments.generation.comparison import FAIRNESS_LOAD, Found, median_of, of, policy_rows


def draw_all(found: Found, folder: Path) -> list[Path]:
    """Writes every picture for which there are cells, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    loads = sorted({each["load"] for each in found if each["kind"] == "policy" and each["workload"] == "lmaas"})
    pictures = {
        "goodput": _by_load(found, loads, "Requests in time", "share of requests", "goodput"),
        "response": _by_load(found, loads, "Mean time to the whole answer", "s", "latency_s", "mean", log=True),
        "first-token": _by_load(found, loads, "Mean time to the first token", "s", "ttft_s", "mean", log=True),
        "occupancy": _by_load(found, loads, "Rows that decode in a mean step", "rows", "occupancy"),
        "waste": _by_load(found, loads, "Tokens computed again", "tokens", "recomputed_tokens"),
        "fairness": _fairness(found),
        "prefix": _prefix(found),
        "prediction": _prediction(found),
        "placement": _placement(found),
    }
    paths = []
    for name, drawn in pictures.items():
        if drawn is not None:
            paths.append(folder / f"{name}.png")
            write_atomically(paths[-1], drawn)
    return paths


def _png(draw: Callable[[Axes], None], title: str, x: str, y: str) -> bytes:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.set(title=title, xlabel=x, ylabel=y)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(fontsize=8, loc="outside right upper")
    axes.grid(alpha=0.3)
    return png(figure)


def _by_load(found: Found, loads: list[float], title: str, unit: str, *path: str, log: bool = False) -> bytes | None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for load in loads:
        for name, lengths, cells in policy_rows(found, "lmaas", load):
            value = median_of(cells, *path)
            if value is not None:
                curves.setdefault(f"{name}, {lengths}" if lengths == "known" else name, []).append((load, value))
    if not curves:
        return None

    def draw(axes: Axes) -> None:
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        if log:
            axes.set_yscale("log")

    return _png(draw, title, "load", unit)


def _fairness(found: Found) -> bytes | None:
    rows = [(name, of(found, "fairness", "lmaas", FAIRNESS_LOAD, name)) for name in ("fused", "vtc")]
    rows = [(name, cells) for name, cells in rows if cells]
    if not rows:
        return None

    def draw(axes: Axes) -> None:
        for shift, user in ((-0.2, "light"), (0.2, "heavy")):
            values = [median_of(cells, f"{user}_ttft_s") or 0.0 for _, cells in rows]
            axes.bar([at + shift for at in range(len(rows))], values, width=0.4, label=f"{user} users")
        axes.set_xticks(range(len(rows)), [name for name, _ in rows])

    return _png(draw, "One of five users sends 80 % of the requests", "policy", "mean s to the first token")


def _prefix(found: Found) -> bytes | None:
    loads = sorted({each["load"] for each in found if each["kind"] == "prefix"})
    if not loads:
        return None

    def draw(axes: Axes) -> None:
        for name, shift in zip(PREFIXES, (-0.2, 0.2), strict=True):
            values = [median_of(of(found, "prefix", "lmaas", load, name), "ttft_s", "mean") or 0.0 for load in loads]
            axes.bar([at + shift for at in range(len(loads))], values, width=0.4, label=name)
        axes.set_xticks(range(len(loads)), [f"{load:g}" for load in loads])
        axes.set_yscale("log")

    title = f"Prompts that begin with {SYSTEM_TOKENS} tokens of their class"
    return _png(draw, title, "load", "mean s to the first token")


def _prediction(found: Found) -> bytes | None:
    names = sorted({Path(each["workload"]).stem for each in found if each["kind"] == "prediction"})
    if not names:
        return None

    def draw(axes: Axes) -> None:
        for at, predictor in enumerate(PREDICTORS):
            values = [median_of(of(found, "prediction", name, 1.0, predictor), "mean_error") or 0.0 for name in names]
            axes.bar([place + 0.25 * (at - 1) for place in range(len(names))], values, width=0.25, label=predictor)
        axes.set_xticks(range(len(names)), names)

    return _png(draw, "Error of the 0.9 quantile of lengths", "workload", "tokens")


def _placement(found: Found) -> bytes | None:
    cells = [each for each in found if each["kind"] == "placement"]
    if not cells:
        return None
    workloads = sorted({Path(each["workload"]).stem for each in cells})
    rows = [(workload, goals) for workload in workloads for goals in GOALS]

    def draw(axes: Axes) -> None:
        for shift, side in ((-0.2, "fused"), (0.2, "apart")):
            values = [median_of(of(found, "placement", *(row[0], 1.0, row[1])), side) or 0.0 for row in rows]
            axes.barh([at + shift for at in range(len(rows))], values, height=0.4, label=side)
        axes.set_yticks(range(len(rows)), [f"{workload}\n{goals}" for workload, goals in rows], fontsize=7)

    return _png(draw, "Two replicas: both alike, or one for prompts", "requests per second in time", "")
