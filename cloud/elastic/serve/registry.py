"""The registered tasks. The database and the artefacts keep them; the running server holds them in memory."""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from isthmus.cloud.elastic.tasks.task import Measured, ModelShape, Task, TaskSpec, TaskWeights, profiling_of
from isthmus.cloud.store import tasks as rows
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.database import Database
from isthmus.data.images import LabelledImages
from isthmus.proto.checks import identifier
from isthmus.proto.errors import Corrupt, IsthmusError, NotYours, TooLarge
from isthmus.proto.limits import MAX_NAME_CHARS, MAX_TASK_WEIGHTS_BYTES, MAX_TASKS

log = logging.getLogger(__name__)

WEIGHTS_FILE: Final = "weights.safetensors"


class ServedTasks:
    """The tasks that a server answers, by name. Any thread may read them, without waiting."""

    def __init__(self, tasks: Iterable[Task] = ()) -> None:
        self._tasks = {task.name: task for task in tasks}

    def get(self, name: str) -> Task:
        """Returns the task. Raises NotYours for a name that is not registered."""
        try:
            return self._tasks[name]
        except KeyError:
            raise NotYours(f"no task {name.rpartition('/')[2][:64]!r} is registered") from None

    def listing(self) -> list[Task]:
        """Returns every served task, by name."""
        return [task for _, task in sorted(self._tasks.items())]


class Registry(ServedTasks):
    """Tasks that clients register.

    Adding and removing block: do not call them on the event loop. ``changed`` is called for each change, one at a time,
    with the task's name and the task (None: removed).
    """

    def __init__(
        self,
        database: Database,
        artefacts: Artefacts,
        model: ModelShape,
        changed: Callable[[str, Task | None], None] = lambda name, task: None,
        to_measure: Callable[[Task], None] = lambda task: None,
    ) -> None:
        """``to_measure`` is called for each task that came with a profiling set and was not measured yet."""
        super().__init__()
        self._database = database
        self._artefacts = artefacts
        self._model = model
        self._changed = changed
        self._to_measure = to_measure
        self._changing = threading.Lock()

    def load(self) -> None:
        """Loads the tasks that were registered before.

        A task that no longer fits (the server has another model now), or whose weights are missing, stays in the
        database. It is not served, and a warning names it.
        """
        for row in rows.listing(self._database):
            try:
                data = self._stored(row.artefact_id)
                task = self._task(_spec_of(row), data, row.version, _owner(row.name))
                self._serve(task)
                if task.spec.measured is None and self._profiling(task.spec, data) is not None:
                    self._to_measure(task)
            except (IsthmusError, OSError, ValueError, KeyError, TypeError) as error:
                log.warning("task %s is not served: %s", row.name, error)

    def register(
        self, spec: TaskSpec, weights: Path, now_s: float, *, owner: str = "", at_most_of_owner: int | None = None
    ) -> Task:
        """Adds a task with the safetensors file ``weights``, or replaces the owner's task of the same name.

        The file may hold a profiling set. When this returns, the task is stored and served. Raises InvalidInput or
        TooLarge if it does not fit the model, Busy if there are too many tasks, of all owners or (``at_most_of_owner``)
        of this one, and StorageFull.
        """
        identifier("task", spec.name)
        name = f"{owner}/{spec.name}" if owner else spec.name
        if len(name) > MAX_NAME_CHARS:
            raise TooLarge(f"task name: at most {MAX_NAME_CHARS - 1 - len(owner)} characters")
        with weights.open("rb") as file:
            data = file.read(MAX_TASK_WEIGHTS_BYTES + 1)
        self._task(spec, data, 1, owner)
        profiling = self._profiling(spec, data)
        artefact_id = _artefact_id(data)
        with self._changing:
            self._artefacts.put(artefact_id, WEIGHTS_FILE, weights)
            try:
                row, orphan = rows.put(
                    self._database,
                    name,
                    _stored(spec, name),
                    artefact_id,
                    now_s,
                    at_most=MAX_TASKS,
                    at_most_of_tenant=at_most_of_owner,
                )
            except IsthmusError:
                if not rows.named(self._database, artefact_id):
                    self._artefacts.remove(artefact_id)
                raise
            if orphan is not None:
                self._artefacts.remove(orphan)
            task = self._task(spec, data, row.version, owner)
            self._serve(task)
        if profiling is not None:
            self._to_measure(task)
        return task

    def profiling(self, task: Task) -> LabelledImages | None:
        """Reads the profiling set of this version of a task; None if it is not registered any more, or has none."""
        if self._tasks.get(task.name) is not task:
            return None
        for row in rows.listing(self._database):
            if (row.name, row.version) == (task.name, task.version):
                return self._profiling(task.spec, self._stored(row.artefact_id))
        return None

    def measured(self, task: Task, found: Measured) -> bool:
        """Keeps and serves what was measured for this version of a task. Returns whether it is still registered."""
        with self._changing:
            if self._tasks.get(task.name) is not task:
                return False
            spec = replace(task.spec, measured=found)
            if not rows.describe(self._database, task.name, task.version, _stored(spec, task.name)):
                return False
            self._serve(replace(task, spec=spec))
            return True

    def is_current(self, task: Task) -> bool:
        """Returns whether this version of the task is still registered."""
        return self._tasks.get(task.name) is task

    def remove(self, name: str) -> None:
        """Removes the task. Raises NotYours for a name that is not registered."""
        with self._changing:
            identifier("task", name.rpartition("/")[2])
            there, orphan = rows.remove(self._database, name)
            if not there:
                raise NotYours(f"no task {name.rpartition('/')[2]!r} is registered")
            if orphan is not None:
                self._artefacts.remove(orphan)
            self._tasks = {known: task for known, task in self._tasks.items() if known != name}
            self._changed(name, None)

    def _stored(self, artefact_id: str) -> bytes:
        """Returns a task's weights. Raises NotYours if they are gone, and Corrupt if they are damaged."""
        (name,) = self._artefacts.names(artefact_id)[:1] or (WEIGHTS_FILE,)
        with self._artefacts.open(artefact_id, name) as file:
            data = file.read(MAX_TASK_WEIGHTS_BYTES + 1)
        if artefact_id != _artefact_id(data):
            raise Corrupt("its weights are damaged; register it again")
        return data

    def _task(self, spec: TaskSpec, data: bytes, version: int, owner: str) -> Task:
        return Task(spec, TaskWeights.from_bytes(data, classes=len(spec.classes), model=self._model), version, owner)

    def _profiling(self, spec: TaskSpec, data: bytes) -> LabelledImages | None:
        return profiling_of(data, classes=len(spec.classes), model=self._model)

    def _serve(self, task: Task) -> None:
        # The plans must know the task before its first query.
        self._changed(task.name, task)
        self._tasks = {**self._tasks, task.name: task}


def _owner(name: str) -> str:
    return name.rpartition("/")[0]


def _stored(spec: TaskSpec, name: str) -> str:
    """Return the text for the database. The version before refuses the owner's "/", and so serves nobody's task."""
    return json.dumps({**json.loads(spec.to_json()), "name": name})


def _spec_of(row: rows.TaskRow) -> TaskSpec:
    return TaskSpec.from_json(json.dumps({**json.loads(row.spec_json), "name": row.name.rpartition("/")[2]}))


def _artefact_id(weights: bytes) -> str:
    return f"task-{hashlib.sha256(weights).hexdigest()[:48]}"
