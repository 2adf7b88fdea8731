"""Power losses of a device, cuts of its calls, and damage to its frames, each against what must not happen.

    python -m tests.bench.edge.faults power --out docs/results/power-loss_DATE.json
    python -m tests.bench.edge.faults cuts --cuts 1000 --out docs/results/cuts_DATE.json
    python -m tests.bench.edge.faults frames --frames 100000 --out docs/results/frames_DATE.json

Each exits with 1 if something was lost, doubled or accepted. ``power`` needs root, /dev/fuse and libfuse.
"""

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, help=__doc__)

_PASSES = 24

_Out = Annotated[Path, typer.Option(help="JSON file to write.")]


@app.command()
def power(
    out: _Out,
    continue_each: Annotated[int, typer.Option(min=1, help="Continue a device from each so many disks.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Processes that cut.")] = 1,
    most_s: Annotated[float, typer.Option(min=1, help="End after these seconds, with what was seen.")] = 86_400.0,
) -> None:
    """Cut a device's life after every change of its disk, and continue from what is left.

    The changes are taken in ``_PASSES`` passes, so that a run that ends early has seen all parts of the life.
    """
    from tests.rigs.edge.power_loss import LOSSES, Findings, a_life, cut, recorded_life

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir=_in_memory()) as scratch:
        students, plan = a_life(Path(folder))
        (life,) = _forked(lambda worker: recorded_life(students, plan), 1)
        until_s = time.monotonic() + most_s

        def passes(worker: int) -> Findings:
            seen = Findings()
            for begin in range(worker, _PASSES, workers):
                seen.add(
                    cut(
                        life,
                        students,
                        plan,
                        every=_PASSES,
                        begin=begin,
                        continue_each=continue_each,
                        scratch=Path(scratch),
                        until_s=until_s,
                    )
                )
            return seen

        findings = Findings()
        for seen in _forked(passes, workers):
            findings.add(seen)
    _end(
        out,
        {
            "what": "a device's life, cut after every change of its disk",
            "losses_per_change": list(LOSSES),
            "changes_of_the_disk": sum(each[0] != "mark" for each in life),
            "power_losses": findings.points,
            "different_disks_looked_at": findings.looked_at,
            "devices_continued": findings.resumed,
            "faults": dict(findings.faults),
            "first_of_each": findings.first,
        },
        bad=bool(findings.faults) or findings.resumed == 0,
    )


def _forked(work: Callable[[int], Any], workers: int) -> list[Any]:
    """Return what ``work`` makes of each worker's number, each in a process that begins as a copy of this one.

    This process must not have used ONNX Runtime: its threads do not survive the copy. Raises EOFError if one dies.
    """
    context = multiprocessing.get_context("fork")
    started = []
    for number in range(workers):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=lambda n=number, end=theirs: end.send(work(n)))
        process.start()
        theirs.close()
        started.append((process, mine))
    found = [end.recv() for _, end in started]
    for process, _ in started:
        process.join()
    return found


@app.command()
def cuts(
    out: _Out,
    cuts: Annotated[int, typer.Option(min=1, help="Connections to cut, of each kind of call.")] = 1000,
    kinds: Annotated[str, typer.Option(help="Kinds of call, with commas. Default: all.")] = "",
    seed: Annotated[int, typer.Option(help="Of the bytes at which connections are cut: pieces of a long run.")] = 0,
) -> None:
    """Cut connections of every kind of call at random bytes, against a real server."""
    from tests.rigs.cloud.service import make_tiny_release
    from tests.rigs.edge.cut_calls import KINDS, cut_calls

    began_s = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_release(Path(folder) / "release")
        chosen = tuple(kinds.split(",")) if kinds else KINDS
        tally = cut_calls(Path(folder) / "release", Path(folder) / "state", cuts=cuts, seed=seed, kinds=chosen)
    result = {"what": "calls whose connection was cut at a random byte, each tried again until it succeeded"}
    counts = {name: dict(count) for name, count in vars(tally).items()}  # asdict cannot copy a Counter
    _end(out, {**result, **counts, "cpu_s": time.process_time() - began_s}, bad=bool(tally.faults))


@app.command()
def frames(out: _Out, frames: Annotated[int, typer.Option(min=1, help="Damaged frames to receive.")] = 100_000) -> None:
    """Send feature frames through a link that flips bits, until so many have arrived damaged."""
    from tests.rigs.edge.damaged_frames import damaged_frames

    began_s = time.process_time()
    found = damaged_frames(frames)
    result = {"what": "feature frames through a link that flips a bit each 60 bytes on average", **asdict(found)}
    _end(out, {**result, "cpu_s": time.process_time() - began_s}, bad=bool(found.accepted or found.refused_undamaged))


def _in_memory() -> Path | None:
    folder = Path("/dev/shm")
    return folder if folder.is_dir() else None


def _end(out: Path, result: dict[str, Any], *, bad: bool) -> None:
    text = json.dumps(result, indent=1)
    out.write_text(text + "\n", encoding="utf-8")
    typer.echo(text)
    if bad:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
