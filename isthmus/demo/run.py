"""The demo's stages: data, teacher, base student, then a cloud and two devices as separate processes."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape

from isthmus import __version__
from isthmus.command_line import missing_package
from isthmus.data.clip import ClipError, ClipRef, Listing
from isthmus.data.layouts.listing import read_listing
from isthmus.data.media.decode import decode, decode_sound
from isthmus.data.splits import Split
from isthmus.data.synthetic.sets import MEASURED, Guest, make_crema_d
from isthmus.data.transforms import InputSpec
from isthmus.demo.clients import choose_clients
from isthmus.demo.loop import CORRECTIONS, TRAINING_THREADS, Loop
from isthmus.demo.outcome import ClientOutcome, DemoOutcome, KeptClip, readable_seconds
from isthmus.demo.processes import MODULE, Family, termination_unwinds
from isthmus.demo.stages import StageLedger, key_of, only_one
from isthmus.distill.prepare import recipe_for

RATIOS: Final = (1.0, 2.0)
PUBLIC_PEOPLE: Final = 24
PUBLIC_TAKES: Final = 4
"""24 people x 6 classes x 4 takes = 576 public clips."""
CLIENTS: Final = (Guest(classes=(0, 1, 2, 3, 4, 5), takes=32), Guest(classes=(0, 1, 2), takes=48))
"""One client of all classes with 192 clips, one who is neutral, happy or sad with 144. Half of them are tested."""
DIFFICULTY: Final = 0.5
"""That at which ``MEASURED`` people have the spread of RavFace's."""

TRAINING_LIMIT_S: Final = 24 * 3600.0


@dataclass(frozen=True)
class DemoSettings:
    """Settings of a run. ``data`` None: a synthetic set is made below ``out``. ``edge_python`` runs the devices.

    ``people``: the names of the two clients; empty leaves the choice to ``choose_clients``.
    """

    out: Path
    data: Path | None
    seed: int
    preset: str
    edge_python: Path
    people: tuple[str, ...] = ()
    generate_model: Path | None = None
    """Model directory of a language model that replies to each client at the end; None: nobody replies."""


@dataclass(frozen=True)
class _Release:
    root: Path
    key: str
    split: Split


class Demo:
    """One run of the demo. Call ``run`` once."""

    def __init__(self, settings: DemoSettings, console: Console):
        self._settings = settings
        self._console = console
        self._out = settings.out
        self._out.mkdir(parents=True, exist_ok=True)
        self._ledger = StageLedger(self._out / "stages.json")

    def run(self) -> DemoOutcome:
        """Run all stages and return the outcome.

        Raises ChildFailed, which names a log, and ValueError or InvalidInput for unusable data, an unusable environment
        or an unusable language model.
        """
        began_s = time.perf_counter()
        if self._settings.generate_model is not None:
            _check_language_model(self._settings.generate_model)
        edge_has_torch = _check_edge_python(self._settings.edge_python)
        with only_one(self._out), termination_unwinds(), Family(self._out / "logs") as family:
            data = self._settings.data or self._make_data()
            listing = read_listing(data)
            release = self._train(family, data, listing)
            teacher = self._evaluate(family, data, release)
            clients = self._personalise(family, data, listing, release)
        return DemoOutcome(
            data_name=f"{'a synthetic set' if self._settings.data is None else data.name} of {len(listing.refs)} clips",
            synthetic=self._settings.data is None,
            preset=self._settings.preset,
            seed=self._settings.seed,
            classes=listing.classes,
            public_clips=len(release.split.public),
            skipped_clips=len(listing.damaged),
            clients=clients,
            kept=_kept(listing, release.split),
            teacher_accuracy=teacher,
            losses=_losses(release.root),
            stages=tuple(self._ledger.records),
            total_seconds=time.perf_counter() - began_s,
            edge_python=self._settings.edge_python,
            edge_has_torch=edge_has_torch,
            machine=f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        )

    def _make_data(self) -> Path:
        data = self._out / "data"
        guests = [asdict(guest) for guest in CLIENTS]
        key = key_of(
            __version__, PUBLIC_PEOPLE, PUBLIC_TAKES, DIFFICULTY, asdict(MEASURED), guests, self._settings.seed
        )

        def make() -> None:
            shutil.rmtree(data, ignore_errors=True)
            make_crema_d(
                data,
                actors=PUBLIC_PEOPLE,
                takes=PUBLIC_TAKES,
                seed=self._settings.seed,
                difficulty=DIFFICULTY,
                people=MEASURED,
                guests=CLIENTS,
            )

        self._stage("data", key, data, "Making a synthetic data set in CREMA-D's layout", make)
        return data

    def _train(self, family: Family, data: Path, listing: Listing) -> _Release:
        settings = self._settings
        recipe = recipe_for(listing, settings.preset)
        split = choose_clients(listing, data, people=settings.people, seed=settings.seed)
        key = key_of(__version__, recipe.to_json(), settings.seed, _fingerprint(listing), split.to_json())
        root = self._out / f"release-{key}"
        split_file = self._out / "split.json"
        split_file.write_text(split.to_json())
        distill = [sys.executable, *MODULE, "distill"]
        teacher = [*distill, "teacher", "--data", data, "--release", root, "--preset", settings.preset]
        # Its networks are so small that int8 would save 2 MB of memory; the demo's published figures are of float32.
        teacher += ["--split", split_file, "--seed", settings.seed, "--student-precision", "fp32"]
        self._stage(
            "teacher",
            key,
            root / "teacher" / "teacher.safetensors",
            "Training the teacher on the public clips",
            lambda: self._child(family, "teacher", teacher),
        )
        self._stage(
            "base student",
            key,
            root / "base",
            "Distilling the base student, and exporting it",
            lambda: self._child(family, "base student", [*distill, "student", "--release", root]),
        )
        return _Release(root, key, split)

    def _evaluate(self, family: Family, data: Path, release: _Release) -> dict[str, dict[str, float]]:
        figures = release.root / "evaluation.json"
        command = [sys.executable, *MODULE, "distill", "evaluate", "--release", release.root]
        command += ["--data", data, "--out", figures]
        self._stage(
            "evaluation",
            release.key,
            figures,
            "Measuring the teacher on the private clips",
            lambda: self._child(family, "evaluation", command),
        )
        raw = json.loads(figures.read_text())
        return {
            client: {row: value for row, value in raw[client].items() if row.startswith("teacher")}
            for client in release.split.clients
        }

    def _personalise(
        self, family: Family, data: Path, listing: Listing, release: _Release
    ) -> tuple[ClientOutcome, ...]:
        folder, clients, settings = self._out / "run", release.split.clients, self._settings
        shutil.rmtree(folder, ignore_errors=True)
        with self._timed("cloud start", "Starting the cloud"):
            loop = Loop(
                family,
                folder,
                release.root,
                cloud_python=Path(sys.executable),
                edge_python=settings.edge_python,
                seed=settings.seed,
                shares_state=settings.generate_model is not None,
            )
        self._console.print(f"  listening on {loop.address}")
        with self._timed("disclosure", "Enrolling the devices, and looking at what would leave them") as tell:
            loop.disclose(data, clients, lambda: tell(loop.cloud.last_words()))
        with self._timed("devices", "Personalising them over gRPC, and answering their test clips") as tell:
            loop.personalise(data, clients, RATIOS, lambda: tell(loop.cloud.last_words()))
        label_of = {ref.name: listing.classes[ref.label] for ref in listing.refs if ref.label is not None}
        what = f"Correcting {CORRECTIONS} clips on each device, which chooses them"
        if not loop.correctable(clients):
            what = "Correcting nothing: the release has no person model, so devices cannot learn from corrections"
        with self._timed("corrections", what):
            made = loop.correct(data, clients, label_of)
        outcomes = loop.outcomes(made, RATIOS)
        if settings.generate_model is None:
            return outcomes
        with self._timed("words", "Asking the language model for a reply to each client") as tell:
            spoken = loop.speak(settings.generate_model, tuple(made), lambda: tell(loop.cloud.last_words()))
        return tuple(replace(outcome, spoken=spoken[outcome.name]) for outcome in outcomes)

    @contextmanager
    def _timed(self, stage: str, what: str) -> Iterator[Callable[[str], None]]:
        """Run a stage that is never reused. Yields a function that shows a line of progress."""
        self._console.print(f"{what} ...")
        began_s = time.perf_counter()
        with self._console.status(what) as status:
            yield lambda words: status.update(escape(words) or what)
        took_s = time.perf_counter() - began_s
        self._ledger.add(stage, took_s)
        self._console.print(f"  done in {readable_seconds(took_s)}")

    def _child(self, family: Family, name: str, command: list[Any]) -> None:
        child = family.start(name, [str(word) for word in command], env=TRAINING_THREADS)
        with self._console.status(name) as status:
            family.wait(
                child, timeout_s=TRAINING_LIMIT_S, on_tick=lambda: status.update(escape(child.last_words()) or name)
            )

    def _stage(self, name: str, key: str, result: Path, what: str, action: Callable[[], None]) -> None:
        self._console.print(f"{what} ...")
        record = self._ledger.run(name, key, result, action)
        took = readable_seconds(record.seconds)
        self._console.print(f"  reused from an earlier run ({took})" if record.reused else f"  done in {took}")


def _check_language_model(folder: Path) -> None:
    """Raise ValueError or InvalidInput if the model could not reply at the end. Its weights are not read yet."""
    try:
        from isthmus.cloud.generation.model.configuration import LlamaConfig
        from isthmus.cloud.generation.model.tokenizer import TextTokenizer
        from isthmus.cloud.generation.model.weights import weight_files
    except ModuleNotFoundError as error:
        raise ValueError(missing_package("--generate-model", error.name or "tokenizers", "generate")) from error
    tokenizer = TextTokenizer.read(folder, LlamaConfig.read(folder))
    weight_files(folder)
    if not tokenizer.has_template:
        raise ValueError(f"{folder} has no chat template, so it cannot reply: give a model that was made for chats")


def _check_edge_python(python: Path) -> bool:
    """Return whether torch is installed there. Raises ValueError if the device's part of Isthmus is not."""
    code = "import importlib.util as u, isthmus.edge.commands.edge; print(u.find_spec('torch') is not None)"
    way_out = "'make install-edge' makes an environment for devices; --edge-python names another."
    try:
        done = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{python} does not run ({getattr(error, 'strerror', None) or error}). {way_out}") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{python} cannot run a device: {last}. {way_out}")
    return done.stdout.strip() == "True"


def _fingerprint(listing: Listing) -> list[tuple[str, int | None, list[tuple[int, int]]]]:
    """Return names, labels, file sizes and modification times: the identity of the data a release was trained on."""
    rows = []
    for ref in listing.refs:
        stats = [path.stat() for path in (ref.audio_path, ref.video_path) if path is not None]
        rows.append((ref.name, ref.label, [(stat.st_size, stat.st_mtime_ns) for stat in stats]))
    return rows


def _kept(listing: Listing, split: Split) -> tuple[KeptClip, ...]:
    """Return the first clip of each client that decodes, at the paper's input size."""
    ref_of = {ref.name: ref for ref in listing.refs}
    found = (next(_decoded(ref_of[name] for name in clips), None) for clips in split.clients.values())
    return tuple(clip for clip in found if clip is not None)


def _decoded(refs: Iterable[ClipRef]) -> Iterator[KeptClip]:
    spec = InputSpec()
    for ref in refs:
        with suppress(ClipError):  # The devices' reports name and count the clips that do not decode.
            frames_KHWC = decode(ref, spec).frames_KHWC
            if frames_KHWC is not None:
                yield KeptClip(ref.name, decode_sound(ref, spec), spec.sample_rate_hz, frames_KHWC)


def _losses(release: Path) -> dict[str, tuple[float, ...]]:
    teacher = json.loads((release / "teacher" / "history.json").read_text())
    student = json.loads((release / "students" / "0-loss" / "history.json").read_text())
    named = {f"teacher, {stage}": values for stage, values in teacher.items()}
    return {name: tuple(values) for name, values in (named | {"base student": student["distillation"]}).items()}
