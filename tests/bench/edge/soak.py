"""A real hour of a device: processes, sockets and faults, until the time is over.

A cloud, ``isthmus link`` with faults, and ``isthmus edge run`` without a data set, each a process. Camera and
microphone are a film and a sound file of a person who speaks all the time, so every clip has something to tell. The
link fails all the time: it is slow, late, stalls, cuts, refuses and is half-open. In the first half the device is also
ended, killed and asked to personalise again, its capturing child is killed, and the cloud is killed once.

Checked: no clip is answered twice; every clip that the device has stored was answered; each upload is in the cloud
once; no more epsilon is spent than was allowed. Reported: the longest pause between two answers of a process that was
not caused by opening camera and microphone; growth of resident memory: a line's slope and its standard error.

With ``--no-disturb`` one process of the device lives through the whole time, and only the link fails.
"""

import json
import os
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Annotated, Any, Final

import numpy as np
import psutil
import typer

from isthmus.data.layouts.listing import read_listing
from isthmus.data.synthetic.sets import MEASURED, Guest, make_crema_d
from isthmus.demo.cli import default_edge_python
from isthmus.demo.processes import MODULE, Child, Family, ending_with_parent
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.own_clips.store import ClipStore
from tests.bench.harness import Report
from tests.rigs.distill.trained import tiny_loop_recipe, train_release
from tests.rigs.edge.scene import write_scene

LINK: Final[dict[str, Any]] = {
    "seed": 5,
    "repeat": True,
    "up": [
        {"for_s": 40, "delay_ms": 20, "jitter_ms": 10},
        {"for_s": 8, "stall": True},
        {"for_s": 30, "rate_bytes_s": 4000, "delay_ms": 60, "jitter_ms": 60, "loss": 0.02},
        {"for_s": 1, "cut": True},
        {"for_s": 40, "delay_ms": 30},
        {"for_s": 15, "half_open": True},
        {"for_s": 30, "delay_ms": 30, "cut_every_bytes": 20000},
        {"for_s": 10, "cut": True, "refuse": True},
    ],
    "down": [
        {"for_s": 55, "delay_ms": 20, "jitter_ms": 20},
        {"for_s": 6, "stall": True},
        {"for_s": 50, "delay_ms": 80, "jitter_ms": 200},
    ],
}
DISTURBED: Final = ("again", "driver", "kill", "again", "end", "driver", "cloud", "kill", "again", "kill")
"""What is done to the device and the cloud in the first half, at equal distances."""
EPSILON_BUDGET: Final = 6
OPENING_S: Final = 15.0
"""So long after the start of a capturing child there may be no answers."""
SAMPLE_S: Final = 10.0
SETTLING_S: Final = 600.0
"""Memory of a process grows at first, while its windows, logs and caches fill; a slope begins after that."""
BLOCKS: Final = 10
"""Samples a few seconds apart are not independent, so a slope is fitted to the medians of so many equal parts."""
_ANSWER: Final = re.compile(r"(\S+): \S+ \((on the device|through the cloud)")


@dataclass
class Run:
    """One process of the device, and what it has said. Times are of ``time.monotonic``."""

    process: "subprocess.Popen[str]"
    began_s: float
    ended_by: str = ""
    answers: list[tuple[float, str, bool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    opened_s: list[float] = field(default_factory=list)

    def listen(self) -> None:
        for pipe, take in ((self.process.stdout, self._answer), (self.process.stderr, self.notes.append)):
            assert pipe is not None
            threading.Thread(target=_read, args=(pipe, take), daemon=True).start()

    def end(self, number: signal.Signals) -> None:
        self.ended_by = number.name
        self.process.send_signal(number)
        self.process.wait(60)
        time.sleep(0.5)  # the readers take what is left in the pipes

    def _answer(self, line: str) -> None:
        found = _ANSWER.match(line)
        if found is not None:
            self.answers.append((time.monotonic(), found[1], found[2] == "through the cloud"))


def _read(pipe: IO[str], take: Any) -> None:
    for line in pipe:
        take(line.rstrip())


@dataclass
class Hour:
    """The processes of a soak, below ``folder``."""

    folder: Path
    family: Family
    edge_python: Path
    release: Path
    cloud_address: str = ""
    runs: list[Run] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.film, self.sound = write_scene(self.folder)
        self.cloud = self._start_cloud()
        script = self.folder / "link.json"
        script.write_text(json.dumps(LINK))
        command: list[str | Path] = [self.edge_python, *MODULE, "link", "--listen", "127.0.0.1:0"]
        link = self.family.start("link", [*command, "--to", self.cloud_address, "--script", script])
        self.address = _printed_address(link)

    def start(self, *, again: bool = False) -> None:
        """Start the device."""
        words = ["edge", "run", "--cloud", self.address, "--state", self.folder / "device", "--camera", self.film]
        words += ["--microphone", self.sound, "--clips-before", "8", "--latency-budget-ms", "400", "--noise", "1"]
        words += ["--epsilon-budget", str(EPSILON_BUDGET), "--no-guard", *(["--again"] if again else [])]
        process = subprocess.Popen(
            ending_with_parent([self.edge_python, *MODULE, *words]),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        run = Run(process, time.monotonic())
        run.opened_s.append(run.began_s)
        run.listen()
        self.runs.append(run)

    def disturb(self, how: str) -> None:
        run = self.runs[-1]
        match how:
            case "driver":
                for child in psutil.Process(run.process.pid).children():
                    child.kill()
                run.opened_s.append(time.monotonic())
            case "cloud":
                self.cloud.process.kill()
                self.cloud.process.wait()
                self.cloud = self._start_cloud()
            case _:
                run.end(signal.SIGKILL if how == "kill" else signal.SIGTERM)
                self.start(again=how == "again")

    def sample(self) -> None:
        """Note memory, descriptors, threads and processor time of the device and its children."""
        try:
            device = psutil.Process(self.runs[-1].process.pid)
            times = device.cpu_times()
            children = [each.memory_info().rss for each in device.children()]
            self.samples.append(
                {
                    "at_s": time.monotonic(),
                    "rss_bytes": device.memory_info().rss,
                    "children_bytes": sum(children),
                    "descriptors": device.num_fds(),
                    "threads": device.num_threads(),
                    "cpu_s": times.user + times.system + times.children_user + times.children_system,
                }
            )
        except psutil.NoSuchProcess:
            pass

    def _start_cloud(self) -> Child:
        address = self.folder / "cloud.address"
        address.unlink(missing_ok=True)
        command: list[str | Path] = [sys.executable, *MODULE, "cloud", "serve", "--release", self.release, "--state"]
        command += [self.folder / "cloud", "--listen", self.cloud_address or "127.0.0.1:0", "--port-file", address]
        child = self.family.start("cloud", command)
        self.cloud_address = self.family.wait_for_address(child, address, 300)
        return child


def longest_pause_s(run: Run) -> float:
    """Return the longest time between two answers, without those in which a capturing child was being opened."""
    times_s = [at_s for at_s, _, _ in run.answers]
    pauses = [
        after_s - before_s
        for before_s, after_s in pairwise(times_s)
        if not any(before_s - OPENING_S <= opened_s <= after_s for opened_s in run.opened_s)
    ]
    return max(pauses, default=0.0)


def slope_per_hour(at_s: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return the slope of values over time, per hour, and its standard error.

    Ordinary least squares on the medians of ``BLOCKS`` parts of equal length. Raises ValueError for fewer samples.
    """
    if len(values) < BLOCKS:
        raise ValueError(f"{len(values)} samples are too few for a slope: it needs {BLOCKS}")
    hours_B = np.array([np.median(part) for part in np.array_split(np.asarray(at_s) / 3600, BLOCKS)])
    values_B = np.array([np.median(part) for part in np.array_split(np.asarray(values, np.float64), BLOCKS)])
    centred_B = hours_B - hours_B.mean()
    slope = float(centred_B @ values_B / (centred_B @ centred_B))
    rest_B = values_B - values_B.mean() - slope * centred_B
    return slope, float(np.sqrt(rest_B @ rest_B / (BLOCKS - 2) / (centred_B @ centred_B)))


def uploads(cloud: Path) -> list[tuple[str, int]]:
    """Return (idempotency key of the job, round) of each upload that the cloud has stored."""
    (path,) = [each for each in cloud.rglob("*") if each.is_file() and each.open("rb").read(15) == b"SQLite format 3"]
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        query = "SELECT jobs.idempotency_key, uploads.round FROM uploads JOIN jobs ON jobs.id = uploads.job_id"
        return [(str(key), int(number)) for key, number in database.execute(query)]


def main(
    hours: float = 1.0,
    edge_python: Annotated[Path | None, typer.Option(help="Python of the device's environment.")] = None,
    release: Annotated[Path | None, typer.Option(help="The cloud's release. Default: a tiny one is trained.")] = None,
    disturb: Annotated[bool, typer.Option(help="End and kill processes in the first half.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Run a device for ``hours``, and check what it has answered and sent."""
    disturbed = DISTURBED if disturb else ()
    report = Report("soak", {"hours": hours, "link": LINK, "disturbed": disturbed}, ("grpcio", "onnxruntime"))
    with tempfile.TemporaryDirectory(prefix="isthmus-soak-") as name, Family(Path(name) / "logs") as family:
        folder = Path(name)
        hour = Hour(folder, family, edge_python or default_edge_python(), release or _trained(folder))
        _live(hour, hours * 3600, disturbed)
        _judge(hour, report)
    report.finish({"what": lambda row: str(row["what"]), "found": lambda row: str(row["found"])}, out)
    if report.floors["faults"]:
        raise typer.Exit(1)


def _trained(folder: Path) -> Path:
    data, guests = folder / "data", [Guest((0, 1, 2, 3, 4, 5), 2), Guest((1, 3, 5), 4)]
    make_crema_d(data, actors=8, takes=1, seed=0, difficulty=0.3, people=MEASURED, guests=guests, progress=False)
    return train_release(folder / "release", data, tiny_loop_recipe(read_listing(data).classes)).release


def _live(hour: Hour, seconds: float, disturbed: Sequence[str]) -> None:
    hour.start()
    began_s = time.monotonic()
    due = [(began_s + seconds / 2 * (place + 1) / (len(disturbed) + 1), how) for place, how in enumerate(disturbed)]
    while (now_s := time.monotonic()) < began_s + seconds:
        if due and now_s >= due[0][0]:
            hour.disturb(due.pop(0)[1])
        if hour.runs[-1].process.poll() is not None:
            raise RuntimeError(f"the device has ended by itself: {hour.runs[-1].notes[-3:]}")
        hour.sample()
        time.sleep(min(SAMPLE_S, max(0.1, seconds / 100)))
    hour.runs[-1].end(signal.SIGTERM)


def _judge(hour: Hour, report: Report) -> None:
    def row(what: str, found: object) -> None:
        report.rows.append({"what": what, "found": found})

    faults = Counter[str]()
    total = by_cloud = 0
    for number, run in enumerate(hour.runs, 1):
        twice = [clip for clip, count in Counter(each[1] for each in run.answers).items() if count > 1]
        total, by_cloud = total + len(run.answers), by_cloud + sum(each[2] for each in run.answers)
        ended = {"ended by": run.ended_by, "code": run.process.returncode}
        pause_s = round(longest_pause_s(run), 1)
        row(f"process {number}", {"answers": len(run.answers), "longest pause, s": pause_s, "twice": twice, **ended})
        faults.update(twice=len(twice))
        young = not run.answers and not run.notes  # it had no handler of signals yet
        if run.ended_by == "SIGTERM" and run.process.returncode not in ((0, 130, -15) if young else (0, 130)):
            faults["bad end"] += 1
    row("answers", total)
    row("through the cloud", by_cloud)
    row("said", dict(Counter(note[:80] for run in hour.runs for note in run.notes).most_common(20)))
    answered = [name for run in hour.runs for _, name, _ in run.answers]
    kept = [clip.name for clip in ClipStore(hour.folder / "device" / "clips").clips()]
    row("clips stored at the end", {"all": len(kept), "unanswered": [name for name in kept if name not in answered]})
    faults.update(lost=len(set(kept) - set(answered)), twice=len(answered) - len(set(answered)))
    device = DeviceState(hour.folder / "device")
    ledger, stored = device.ledger(), uploads(hour.folder / "cloud")
    spent = sum(entry.epsilon or 0.0 for entry in ledger)
    row("epsilon spent", spent)
    keys = {entry.idempotency_key for entry in ledger}
    foreign = [key for key, _ in stored if key.partition("-")[0] not in keys]
    repeated = [key for key, count in Counter(stored).items() if count > 1]
    row("uploads", {"ledger": len(ledger), "cloud": len(stored), "foreign": foreign, "repeated": repeated})
    faults.update(spent=int(spent > EPSILON_BUDGET), foreign=len(foreign), repeated=len(repeated))
    row("student at the end", device.agent().active_id)
    last_s = hour.runs[-1].began_s
    # The first minute of a process is that of its personalisation.
    alone = [each for each in hour.samples if each["at_s"] > last_s + min(60.0, (time.monotonic() - last_s) / 10)]
    if len(alone) >= 10:
        tenth = len(alone) // 10
        for what in ("rss_bytes", "children_bytes", "descriptors", "threads"):
            values = [each[what] for each in alone]
            row(f"{what}, undisturbed: first and last tenth", _ends(values, tenth))
        settled = [each for each in alone if each["at_s"] > last_s + SETTLING_S]
        for what in ("rss_bytes", "children_bytes") if len(settled) >= BLOCKS else ():
            growth = slope_per_hour([each["at_s"] for each in settled], [each[what] for each in settled])
            row(f"{what}, growth per hour and its standard error, in MB", [round(each / 1e6, 2) for each in growth])
        minutes = [alone[place] for place in range(0, len(alone), max(1, round(60 / SAMPLE_S)))]
        row("threads, undisturbed, each minute", [each["threads"] for each in minutes])
        row("rss in MB, undisturbed, each minute", [round(each["rss_bytes"] / 1e6, 1) for each in minutes])
        wall_s = alone[-1]["at_s"] - alone[0]["at_s"]
        row("processor share of the device, undisturbed", round((alone[-1]["cpu_s"] - alone[0]["cpu_s"]) / wall_s, 4))
    report.floors["faults"] = sum(faults.values())
    report.notes.append(f"faults by kind: {dict(faults)}")


def _ends(values: list[float], tenth: int) -> list[float]:
    return [statistics.median(values[:tenth]), statistics.median(values[-tenth:])]


def _printed_address(link: Child) -> str:
    """Return HOST:PORT at which the link listens, as it has printed it."""
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        found = re.search(r"(127\.0\.0\.1:\d+)", link.log_path.read_text(errors="replace"))
        if found is not None:
            return found[1]
        time.sleep(0.1)
    raise link.failure("did not listen")


if __name__ == "__main__":
    typer.run(main)
