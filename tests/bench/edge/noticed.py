"""How soon a device notices what is wrong with its camera or microphone, with real processes and a real sound server.

The camera is a film that OpenCV decodes, the microphone PortAudio on a sound server's monitor, and both are read by the
capturing child. The child is stopped as by a driver that hangs, the film freezes, and the sound server is killed. The
times of blocks are compared with the samples that were counted, which is the skew between sound and pictures: those are
stamped by the device's clock.
"""

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import numpy as np
import typer

from isthmus.data.media.encode import write_mp4
from isthmus.data.transforms import InputSpec
from isthmus.edge.capture.process import Capture
from isthmus.edge.capture.records import Source
from tests.bench.harness import Report
from tests.rigs.edge import sound
from tests.rigs.edge.scene import faces
from tests.rigs.edge.sound import SoundServer, sound_server

SPEC = InputSpec(duration_s=1.0, spectrogram_bins=65, spectrogram_columns=60, frame_px=32, stored_px=36)
_OPENS_S = 120.0


@contextmanager
def capturing(server: SoundServer, film: Path) -> Iterator[tuple[Capture, list[tuple[float, str]]]]:
    """Yield a capture that has pictures and sound, and what it says with the times."""
    said: list[tuple[float, str]] = []
    with (
        patch.dict(os.environ, server.environment),
        Capture(
            SPEC, time.monotonic, lambda text: said.append((time.monotonic(), text)), camera=str(film), gated=False
        ) as capture,
    ):
        deadline_s = time.monotonic() + _OPENS_S
        while time.monotonic() < deadline_s:
            captured = capture.next_clip("opening")
            if captured.pictures is not None and captured.waveform_T is not None:
                break
        else:
            raise RuntimeError(f"camera and microphone did not open: {said}")
        said.clear()
        yield capture, said


def noticed_s(capture: Capture, said: list[tuple[float, str]], do: Callable[[], object], words: str) -> float:
    """Return the seconds from ``do`` until a sentence with ``words`` is said."""
    began_s = time.monotonic()
    do()
    while not any(words in text for _, text in said):
        if time.monotonic() > began_s + _OPENS_S:
            raise RuntimeError(f"it was never noticed: {said}")
        capture.next_clip("look")
    return next(at_s for at_s, text in said if words in text) - began_s


def skew_s(capture: Capture, seconds: float) -> float:
    """Return the largest distance between a block's time and the time that its samples, counted from the first, say."""
    known: dict[float, int] = {}
    rate_hz = 1
    ends_s = time.monotonic() + seconds
    while time.monotonic() < ends_s:
        capture.next_clip("skew")
        blocks, _ = capture.recent()
        rate_hz = blocks[-1].rate_hz
        known.update({block.at_s: len(block.samples_T) for block in blocks})
    stamps = np.array(sorted(known))
    counted = stamps[0] + np.cumsum([0, *(known[at_s] for at_s in stamps[:-1])]) / rate_hz
    return float(np.abs(stamps - counted).max())


def main(
    repeats: int = 3,
    skew_seconds: Annotated[float, typer.Option(help="Seconds over which the skew is measured.")] = 60.0,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Cause each trouble ``repeats`` times, and say after how many seconds it was noticed."""
    report = Report("noticed", {"repeats": repeats, "skew_seconds": skew_seconds}, ("opencv-python-headless",))
    found: dict[str, list[float]] = {"driver hangs": [], "picture is frozen": [], "microphone is pulled out": []}
    with tempfile.TemporaryDirectory(prefix="isthmus-noticed-") as name:
        folder = Path(name)
        moving, still = folder / "moving.mp4", folder / "still.mp4"
        write_mp4(moving, faces(60), 12, np.zeros(80_000, np.float32), 16_000)
        write_mp4(still, np.full((2_400, 96, 128, 3), 120, np.uint8), 12, np.zeros(16_000, np.float32), 16_000)
        for number in range(repeats):
            with ExitStack() as stack:
                place = folder / str(number)
                place.mkdir()
                server = stack.enter_context(sound_server(place))
                tone_T = 0.2 * np.sin(np.arange(600 * sound.RATE_HZ) * (2 * np.pi * 440 / sound.RATE_HZ))
                server.play(tone_T.astype(np.float32))
                capture, said = stack.enter_context(capturing(server, moving))
                if number == 0:
                    report.floors["skew_s"] = skew_s(capture, skew_seconds)
                child = capture._child
                assert child is not None
                stop = noticed_s(capture, said, partial(child.send_signal, signal.SIGSTOP), "no pictures any more")
                found["driver hangs"].append(stop)
            with ExitStack() as stack:
                (place / "again").mkdir()
                server = stack.enter_context(sound_server(place / "again"))
                server.play(tone_T.astype(np.float32))
                capture, said = stack.enter_context(capturing(server, moving))
                found["microphone is pulled out"].append(noticed_s(capture, said, server.unplug, "no sound any more"))
            found["picture is frozen"].append(frozen_s(still))
    for what, values in found.items():
        report.rows.append({"what": what, "median_s": statistics.median(values), "most_s": max(values)})
    report.finish(
        {
            "what": lambda row: str(row["what"]),
            "noticed after, s (median, most)": lambda row: f"{row['median_s']:.1f}, {row['most_s']:.1f}",
        },
        out,
    )


def frozen_s(still: Path) -> float:
    """Return the seconds from the first picture of a camera that shows one and the same until it is said."""
    said: list[float] = []
    with Capture(
        SPEC, time.monotonic, lambda text: said.append(time.monotonic()), camera=str(still), microphone="none"
    ) as capture:
        began_s = None
        while not said:
            capture.next_clip("look")
            began_s = began_s or (capture._seen[Source.CAMERA].changed_s if Source.CAMERA in capture._seen else None)
    assert began_s is not None
    return said[0] - began_s


if __name__ == "__main__":
    typer.run(main)
