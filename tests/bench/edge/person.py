"""Cost of learning one user on the device: the estimate from a full window, and what it adds to an answer.

The person model is random, so the turns of the estimate may end sooner for real people. An answer by habits stands
beside the one by the offset, since the offset takes its place.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from isthmus.edge.own_clips.corrections import Correction
from isthmus.edge.own_clips.habits import Habits
from isthmus.edge.own_clips.personal import Reading, understand
from isthmus.edge.own_clips.window import Seen, Window
from isthmus.proto.messages import Features
from tests.bench.harness import Report, interleaved, shown
from tests.rigs.distill.people import person_model


def main(
    clips: int = 200,
    classes: int = 6,
    width: int = 512,
    corrections: int = 12,
    answers: Annotated[int, typer.Option(help="Answers timed together: one is too short for the clock.")] = 1_000,
    repeats: int = 20,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Time the estimate from ``clips`` clips, and one answer with and without it."""
    config = {"clips": clips, "classes": classes, "width": width, "corrections": corrections, "answers": answers}
    report = Report("person", {**config, "repeats": repeats, "seed": 0})
    rng = np.random.default_rng(0)
    names = tuple(f"class {number}" for number in range(classes))
    centred = person_model(classes, width)
    seen = [
        Seen(
            f"clip {number}",
            Features(*rng.standard_normal((2, width)).astype(np.float32)),
            rng.dirichlet(np.ones(classes)).astype(np.float32),
        )
        for number in range(clips)
    ]
    window = Window.of(seen)
    said = [Correction(each.name, names[number % classes], 0.0, "s") for number, each in enumerate(seen[:corrections])]
    learned, corrected = understand("s", centred, window), understand("s", centred, window, said, names)
    even = (1 / classes,) * classes
    habits = Habits("s", clips, even, even)
    asked = seen[0]

    def answer(reading: Reading) -> None:
        for _ in range(answers):
            reading.local(asked.raw_C, asked.features)

    timed = interleaved(
        {
            "estimate": lambda: understand("s", centred, window),
            f"estimate with {corrections} corrections": lambda: understand("s", centred, window, said, names),
            "answer by habits": lambda: answer(habits),
            "answer by the offset": lambda: answer(learned),
            "answer with corrections": lambda: answer(corrected),
            "window as a file": lambda: Window.from_bytes(window.to_bytes()),
        },
        repeats=repeats,
    )
    for what, timing in timed.items():
        each = answers if what.startswith("answer") else 1
        cpu_ms = {
            name: value / each * 1e3 if name != "repeats" else value for name, value in timing.cpu_s.to_json().items()
        }
        report.rows.append({"what": what, "cpu_ms": cpu_ms})
    report.finish(
        {"what": lambda row: str(row["what"]), "CPU ms, median (quartiles)": lambda row: shown(row["cpu_ms"])}, out
    )


if __name__ == "__main__":
    typer.run(main)
