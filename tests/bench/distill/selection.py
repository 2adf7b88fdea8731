"""Speed of selection over a large public set, against its floors, scikit-learn and faiss; optionally every strategy.

Neither library selects greedily; both return each row's k nearest. Earlier rows may take the nearest samples of a later
one, so the last of K rows needs its n * K nearest. Both libraries take one k for all rows, so every row gets n * K.
(faiss on the CPU has no limit on k; on the GPU the limit is 2,048, and n * K is 3,000 here.) The same greedy choice is
then made on their neighbours. Neither breaks ties by index, so with ties they take other samples of the same
similarity; ``same_as_ours`` is the share of picks that agree. Other strategies are timed beside the paper's
(``isthmus``), without features.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import numpy.typing as npt
import typer
from sklearn.neighbors import NearestNeighbors

from isthmus.distill.selection import STRATEGIES, Public, Wanted, select_cosine
from tests.bench import THREADS, machine
from tests.bench.harness import Report, Timing, interleaved, shown

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


def smooth(rng: np.random.Generator, samples: int, classes: int) -> Floats:
    """Return outputs that spread over several classes."""
    return rng.dirichlet(np.full(classes, 0.3), samples).astype(np.float32)


def tied(rng: np.random.Generator, samples: int, classes: int) -> Floats:
    """Return outputs of a certain teacher: thousands per class are equal to the last bit."""
    return np.eye(classes, dtype=np.float32)[rng.integers(0, classes, samples)]


def near_one_hot(rng: np.random.Generator, samples: int, classes: int) -> Floats:
    """Return certain outputs of which no two are equal. Similarities differ by less than float32's resolution."""
    logits_NC = rng.standard_normal((samples, classes), np.float32)
    logits_NC[np.arange(samples), rng.integers(0, classes, samples)] += 20
    likelihood_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    probabilities_NC: Floats = likelihood_NC / likelihood_NC.sum(axis=1, keepdims=True)
    return probabilities_NC


SETS: dict[str, Callable[[np.random.Generator, int, int], Floats]] = {
    "smooth": smooth,
    "tied": tied,
    "near-one-hot": near_one_hot,
}


def greedy(neighbours_KM: Indices, samples: int, samples_per_row: int) -> Indices:
    """Let each row in turn take its first ``samples_per_row`` neighbours that are still free."""
    taken_N = np.zeros(samples, dtype=bool)
    picked = []
    for neighbours_M in neighbours_KM:
        free = neighbours_M[~taken_N[neighbours_M]][:samples_per_row]
        taken_N[free] = True
        picked.append(free)
    return np.concatenate(picked)


def with_scikit_learn(prototypes_KC: Floats, public_NC: Floats, samples_per_row: int) -> Indices:
    wanted = min(samples_per_row * len(prototypes_KC), len(public_NC))
    model = NearestNeighbors(n_neighbors=wanted, algorithm="brute", metric="cosine", n_jobs=1).fit(public_NC)
    return greedy(model.kneighbors(prototypes_KC, return_distance=False), len(public_NC), samples_per_row)


def with_faiss(prototypes_KC: Floats, public_NC: Floats, samples_per_row: int) -> Indices:
    """Select with faiss. Normalising and copying into the index are included, like those of ours."""
    wanted = min(samples_per_row * len(prototypes_KC), len(public_NC))
    unit_NC, unit_KC = public_NC.copy(), prototypes_KC.copy()
    faiss.normalize_L2(unit_NC)
    faiss.normalize_L2(unit_KC)
    index = faiss.IndexFlatIP(public_NC.shape[1])
    index.add(unit_NC)
    return greedy(index.search(unit_KC, wanted)[1], len(public_NC), samples_per_row)


def bare_product(prototypes_KC: Floats, public_NC: Floats, dtype: npt.DTypeLike, block: int = 512) -> None:
    """Compute the similarities alone, in blocks that stay in cache: the attainable rate for such short rows."""
    left_KC = prototypes_KC.astype(dtype)
    out_KB = np.empty((len(left_KC), block), dtype)
    for start in range(0, len(public_NC) - block + 1, block):
        np.matmul(left_KC, public_NC[start : start + block].astype(dtype, copy=False).T, out=out_KB)


def main(
    samples: int = 1_000_000,
    prototypes: int = 300,
    classes: int = 28,
    samples_per_row: int = 10,
    repeats: int = 5,
    strategies: Annotated[bool, typer.Option(help="Also time every other strategy.")] = True,
    rivals: Annotated[bool, typer.Option(help="Also time scikit-learn and faiss (gigabytes of memory).")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Time selection against its floors, scikit-learn and faiss."""
    faiss.omp_set_num_threads(THREADS)
    config = {"samples": samples, "prototypes": prototypes, "classes": classes, "samples_per_row": samples_per_row}
    report = Report("selection", {**config, "repeats": repeats, "seed": 0}, ("scikit-learn", "faiss-cpu", "scipy"))
    operations = 2.0 * samples * prototypes * classes
    single, double, read = machine.product_rate(np.float32), machine.product_rate(np.float64), machine.read_rate()
    report.floors = {
        "float32 product, operations/s": single,
        "float64 product, operations/s": double,
        "memory read, bytes/s": read,
        "operations over float32 rate, s": operations / single,
        "operations over float64 rate, s": operations / double,
        "bytes over bandwidth, s": samples * classes * 4 / read,
    }
    floor_s = max(operations / single, samples * classes * 4 / read)
    for name, make in SETS.items():
        rng = np.random.default_rng(0)
        public_NC, prototypes_KC = make(rng, samples, classes), smooth(rng, prototypes, classes)
        measure_set(report, name, prototypes_KC, public_NC, samples_per_row, repeats, strategies, rivals, floor_s)
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "public set": lambda row: str(row["set"]),
        "what": lambda row: str(row["what"]),
        "CPU s, median (quartiles)": lambda row: shown(row["cpu_s"]),
        "wall s": lambda row: shown(row["wall_s"]),
        "times the float32 floor": lambda row: f"{row['times_floor']:.2f}",
        "times cosine": lambda row: f"{row['times_cosine']:.2f}",
        "same picks as ours": lambda row: "" if row["same_as_ours"] is None else f"{row['same_as_ours']:.4f}",
    }
    report.finish(columns, out)


def measure_set(
    report: Report,
    name: str,
    prototypes_KC: Floats,
    public_NC: Floats,
    samples_per_row: int,
    repeats: int,
    strategies: bool,
    rivals: bool,
    floor_s: float,
) -> None:
    """Add a row per candidate on one public set."""
    picks: dict[str, Indices] = {}

    def picking(what: str, select: Callable[[Floats, Floats, int], Indices]) -> Callable[[], None]:
        def run() -> None:
            picks[what] = select(prototypes_KC, public_NC, samples_per_row)

        return run

    candidates: dict[str, Callable[[], object]] = {
        "isthmus": picking("isthmus", select_cosine),
        "bare float32 product": lambda: bare_product(prototypes_KC, public_NC, np.float32),
        "bare float64 product": lambda: bare_product(prototypes_KC, public_NC, np.float64),
    }
    if strategies:
        # Three clips per prototype; the labels are those of the teacher.
        wanted = Wanted(prototypes_KC, np.full(len(prototypes_KC), 3, np.int32))
        public = Public(public_NC, public_NC.argmax(axis=1))

        def selecting(what: str) -> Callable[[], None]:
            def run() -> None:
                picks[what] = STRATEGIES[what](wanted, public, samples_per_row, np.random.default_rng(0)).indices_S

            return run

        candidates.update({what: selecting(what) for what in STRATEGIES if what != "cosine"})
    if rivals:
        candidates["faiss"] = picking("faiss", with_faiss)
        candidates["scikit-learn"] = picking("scikit-learn", with_scikit_learn)
    timings: dict[str, Timing] = interleaved(candidates, repeats=repeats, warmups=min(1, repeats - 1))
    for what, timing in timings.items():
        same = np.isin(picks[what], picks["isthmus"]).mean() if what in picks else None
        report.rows.append(
            {
                "set": name,
                "what": what,
                **timing.to_json(),
                "times_cosine": timing.cpu_s.median / timings["isthmus"].cpu_s.median,
                "times_floor": timing.cpu_s.median / floor_s,
                "same_as_ours": None if same is None else float(same),
            }
        )


if __name__ == "__main__":
    typer.run(main)
