"""The learning steps of a job on a Ray cluster: each step is a call of an actor, on a machine that has room.

An actor stays for some seconds after a step and takes the next one, of this job or another (``kept.py``).

Ray only executes. The job's row stays the truth, and its working files stay with the worker: they go along with each
step and come back from it, the checkpoint after every epoch. So a machine or a cluster that is lost costs the epoch
under way. The worker then takes the job again and goes on from its checkpoint.

A large public set is searched in shards (decision 0043): the searches are tasks all over the cluster, and the worker
merges what they find.
"""

import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from isthmus import __version__
from isthmus.cloud.cluster import connection as cluster
from isthmus.cloud.offers.offer import offer_of
from isthmus.cloud.personalise.elsewhere.kept import KeptActor, end
from isthmus.cloud.personalise.elsewhere.step_folder import step_folder
from isthmus.cloud.personalise.learning import INT8_FILES, Learning, OnEpoch, RoundWork, StepDied
from isthmus.cloud.personalise.students import HEADS_FILE, PERSON_FILE
from isthmus.data.files import write_atomically
from isthmus.distill.selection import Selection
from isthmus.proto.errors import InvalidInput, IsthmusError, Unavailable
from isthmus.proto.messages import Prototypes

if TYPE_CHECKING:
    from isthmus.distill.release import Release
    from isthmus.distill.training.probability_shards import CutArray

log = logging.getLogger(__name__)

POLL_S: Final = 0.5
"""How often to ask a step for its progress."""
PATIENCE_S: Final = 60.0
"""Longest time for an answer to that question."""
LEAVE_S: Final = 5.0
"""Longest time for a step that is ended to remove its files."""
START_S: Final = 600.0
"""Longest time until a cluster has room for a step and the release is read."""
_CHECKPOINT: Final = "checkpoint.safetensors"
_NODE_DIED: Final = "node has died"
"""In Ray's message of an actor that was lost with its machine."""

_Files = dict[str, bytes]


class StepActor:
    """What runs on the cluster. Raises RuntimeError if the machine has another version of Isthmus, or another release.

    The release must be at the same path as on the worker's machine.
    """

    def __init__(self, release: str, release_hash: str, version: str, threads: int | None) -> None:
        if version != __version__:
            raise RuntimeError(f"the cluster has isthmus {__version__}, the worker {version}: install one version")
        self._learning = self._opened(release, release_hash, threads)
        self._changing = threading.Lock()
        self._call = ""
        self._epochs: list[tuple[int, int]] = []
        self._checkpoint: bytes | None = None
        self._folder: Path | None = None

    @staticmethod
    def _opened(release: str, release_hash: str, threads: int | None) -> Learning:
        # Imported on the cluster's machine, so that a worker without work stays small.
        import torch

        from isthmus.cloud.personalise.distilling import DistillLearning
        from isthmus.distill.release import Release

        if threads is not None:
            torch.set_num_threads(threads)
        opened = Release.open(Path(release))
        if offer_of(opened).release_hash != release_hash:
            raise RuntimeError(f"{release} is another release on the cluster than at the worker: copy it there")
        return DistillLearning(opened)

    def pid(self) -> int:
        """Returns the actor's process id."""
        return os.getpid()

    def leave(self) -> None:
        """Removes the files of the step under way, before the actor is killed."""
        if (folder := self._folder) is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def progress(self, call: str, seen: int) -> tuple[list[tuple[int, int]], bytes | None]:
        """Returns a call's (epochs done, total epochs) beyond the first ``seen``, and the last one's checkpoint.

        Before the call has begun, what was made for the one before it is nobody's.
        """
        with self._changing:
            if call != self._call:
                return [], None
            return self._epochs[seen:], self._checkpoint if len(self._epochs) > seen else None

    def select(self, prototypes: Prototypes, round: int, seed: int) -> Selection:
        return self._learning.select(prototypes, round=round, seed=seed)

    def perform(
        self, call: str, step: str, selection: Selection, round: int, rounds: int, seed: int, files: Mapping[str, bytes]
    ) -> _Files:
        """Performs ``distil``, ``train_heads`` or ``export`` on the job's files. Returns the files that it made.

        ``call`` names this call for ``progress``.
        """
        with self._changing:
            self._call, self._epochs, self._checkpoint = call, [], None
        with step_folder() as folder:
            self._folder = folder
            for file, data in files.items():
                (folder / file).write_bytes(data)
            work = RoundWork(selection, round, rounds, seed, folder / _CHECKPOINT)

            def on_epoch(epoch: int, epochs: int) -> None:
                checkpoint = work.checkpoint.read_bytes() if work.checkpoint.exists() else None
                with self._changing:
                    self._epochs.append((epoch, epochs))
                    self._checkpoint = checkpoint

            heads = folder / HEADS_FILE
            if step == "distil":
                self._learning.distil(work, on_epoch)
            elif step == "train_heads":
                self._learning.train_heads(work, heads, on_epoch)
            else:
                made = self._learning.export(work, heads if HEADS_FILE in files else None, folder / "out")
                return {path.name: path.read_bytes() for path in made}
            return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class RayLearning:
    """Performs learning steps on the cluster at ``address``.

    Raises what the step raises, StepDied if the actor's process dies, and Unavailable if the machine or the cluster is
    lost: the step is then to be repeated. An ``on_epoch`` that raises ends the step.
    """

    def __init__(
        self,
        local: Learning,
        release: Path,
        release_hash: str,
        *,
        address: str,
        threads: int | None = None,
        shard_samples: int | None = None,
    ) -> None:
        """``local`` does what is too little for a cluster. ``threads``: of each step; None: chosen by torch.

        ``shard_samples``: a public set of more samples is searched in shards of so many, all over the cluster, if its
        release selects by the paper's strategy; None: never.
        """
        self._local = local
        self._shard_samples = shard_samples
        self._release = str(release.absolute())
        self._release_hash = release_hash
        self._address = address
        self._threads = threads
        self._kept = KeptActor()

    def select(self, prototypes: Prototypes, *, round: int, seed: int) -> Selection:
        if self._in_shards is not None:
            return self._select_in_shards(*self._in_shards, prototypes, round, seed)
        selection: Selection = self._run(lambda actor, call: actor.select.remote(prototypes, round, seed))
        return selection

    @cached_property
    def _in_shards(self) -> "tuple[Release, CutArray] | None":
        """The release and its public set in shards, if that is larger than one shard and can be searched so."""
        if self._shard_samples is None:
            return None
        from isthmus.distill.release import Release
        from isthmus.distill.student.personalise import runs_in_shards
        from isthmus.distill.training.probability_shards import CutArray
        from isthmus.distill.training.teacher_cache import PROBABILITIES_FILE

        release = Release.open(Path(self._release))
        if not runs_in_shards(release.recipe) or len(release.public) <= self._shard_samples:
            return None
        return release, CutArray.open(release.outputs_dir / PROBABILITIES_FILE, self._shard_samples)

    def _select_in_shards(
        self, release: "Release", cut: "CutArray", prototypes: Prototypes, round: int, seed: int
    ) -> Selection:
        from isthmus.cloud.personalise.distilling import wanted_by
        from isthmus.cloud.personalise.elsewhere.shards_on_ray import ShardsOnRay
        from isthmus.distill.student.personalise import select_round
        from isthmus.distill.training.probability_shards import ShardsError

        self._kept.let_go()
        began_s = time.monotonic()
        shards = ShardsOnRay(cut, address=self._address, cpus=self._cpus)
        try:
            selection = select_round(release, wanted_by(prototypes), round=round, seed=seed, shards=shards)
        except ShardsError as error:
            raise Unavailable(str(error)) from error
        took_s = time.monotonic() - began_s
        log.info("selected from %d samples in %d shards on Ray, %.1f s", cut.samples, len(cut.sizes), took_s)
        return selection

    @property
    def _cpus(self) -> int:
        """CPUs of a cluster that this process starts."""
        return self._threads or os.cpu_count() or 1

    def per_class(self, selection: Selection) -> tuple[int, ...]:
        return self._local.per_class(selection)

    def distil(self, work: RoundWork, on_epoch: OnEpoch) -> None:
        files = _files(work.checkpoint)
        made = self._perform("distil", work, files, on_epoch)
        write_atomically(work.checkpoint, made[_CHECKPOINT])

    def train_heads(self, work: RoundWork, heads: Path, on_epoch: OnEpoch) -> None:
        made = self._perform("train_heads", work, _files(work.checkpoint), on_epoch)
        # The heads come last: what belongs to them must be there before they appear.
        for name in sorted(made.keys() - {_CHECKPOINT}, key=lambda name: name == HEADS_FILE):
            write_atomically(heads.with_name(name), made[name])

    def export(self, work: RoundWork, heads: Path | None, out_dir: Path) -> list[Path]:
        files = _files(work.checkpoint)
        if heads is not None:
            beside = (heads.with_name(name) for name in (HEADS_FILE, PERSON_FILE, *INT8_FILES))
            files |= {path.name: path.read_bytes() for path in beside if path == heads or path.is_file()}
        made = self._perform("export", work, files, lambda epoch, epochs: None)
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, data in made.items():
            write_atomically(out_dir / name, data)
        return [out_dir / name for name in made]

    def _perform(self, step: str, work: RoundWork, files: _Files, on_epoch: OnEpoch) -> _Files:
        def begin(actor: Any, call: str) -> Any:
            return actor.perform.remote(call, step, work.selection, work.round, work.rounds, work.seed, files)

        def note(epochs: list[tuple[int, int]], checkpoint: bytes | None) -> None:
            if checkpoint is not None and step == "distil":
                write_atomically(work.checkpoint, checkpoint)
            for epoch, of in epochs:
                on_epoch(epoch, of)

        made: _Files = self._run(begin, note)
        return made

    def _run(
        self,
        begin: Callable[[Any, str], Any],
        note: Callable[[list[tuple[int, int]], bytes | None], None] = lambda epochs, checkpoint: None,
    ) -> Any:
        """Takes an actor, begins the step with it, notes its progress until it is done, and returns the result."""
        try:
            cluster.connect(self._address, self._cpus)
        except InvalidInput as error:
            raise Unavailable(str(error)) from error
        import ray
        from ray.exceptions import ActorDiedError, RayTaskError

        actor: Any = None
        call = secrets.token_hex(8)
        try:
            actor, pid = self._kept.take(self._new_actor, START_S)
            log.info("a step runs on Ray, process %d", pid)
            result, seen, done = begin(actor, call), 0, False
            while not done:
                done = bool(cluster.bounded(lambda: ray.wait([result], timeout=POLL_S)[0], PATIENCE_S))
                epochs, checkpoint = _answer(actor.progress, call, seen)
                seen += len(epochs)
                with _Callers():
                    note(epochs, checkpoint)
            found = cluster.bounded(lambda: ray.get(result), PATIENCE_S)
            self._kept.keep(actor)
            actor = None
            return found
        except _CallersError as error:
            raise error.cause from None
        except RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from error
            raise
        except IsthmusError:
            raise
        except Exception as error:  # no room, no machine, no cluster, no connection
            if actor is not None and isinstance(error, ActorDiedError) and _NODE_DIED not in str(error):
                raise StepDied(f"Ray has lost a step: its process has died. {cluster.last_words(error)}") from error
            raise Unavailable(f"Ray has lost a step: {cluster.last_words(error)}") from error
        finally:
            if actor is not None:
                with suppress(Exception):  # it has died, or its machine has
                    cluster.bounded(lambda: ray.get(actor.leave.remote()), LEAVE_S)
                end(actor)

    def _new_actor(self) -> Any:
        made = cluster.actor(StepActor, cpus=self._threads or 1, gpus=int(cluster.has_gpu()))
        return made.remote(self._release, self._release_hash, __version__, self._threads)


def _answer(method: Any, *arguments: Any) -> Any:
    import ray

    return cluster.bounded(lambda: ray.get(method.remote(*arguments)), PATIENCE_S)


class _CallersError(Exception):
    """An error of the caller's own functions, which is no error of Ray."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Callers:
    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            raise _CallersError(error)


def _files(checkpoint: Path) -> _Files:
    return {checkpoint.name: checkpoint.read_bytes()} if checkpoint.exists() else {}
