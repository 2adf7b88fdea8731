"""The executors of an engine: which of them can run, are lost, or are suspended. The caller holds the engine's lock."""

from collections.abc import Sequence

from isthmus.cloud.elastic.model.executor import Executor, Supervised


class Crew:
    """All executors run at first. ``restarts`` counts executors that were lost and run again."""

    def __init__(self, executors: Sequence[Executor]) -> None:
        self.all = tuple(executors)
        self.wanted = len(executors)
        """Number of executors that are not to be suspended: the first ones."""
        self.restarts = 0
        self._out: set[Executor] = set()
        self._idle: set[Executor] = set()

    @property
    def supervised(self) -> list[Supervised]:
        """The executors outside this process."""
        return [executor for executor in self.all if isinstance(executor, Supervised)]

    @property
    def able(self) -> tuple[int, ...]:
        """The numbers of the executors that can run a batch."""
        return tuple(number for number, executor in enumerate(self.all) if executor not in self._out)

    def want(self, executors: int) -> None:
        """Sets how many executors are wanted.

        Raises ValueError if there are not as many, or one in this process, which cannot be suspended, is among the
        others.
        """
        if not 1 <= executors <= len(self.all):
            raise ValueError(f"{executors} executors are wanted of {len(self.all)}")
        if not all(isinstance(executor, Supervised) for executor in self.all[executors:]):
            raise ValueError("an executor in a thread of the server cannot be suspended")
        self.wanted = executors

    def surplus(self, executor: Executor) -> bool:
        """Returns whether this executor is to be suspended."""
        return executor not in self.all[: self.wanted]

    def was_suspended(self, executor: Executor) -> bool:
        """Returns whether this executor was suspended and has not run since."""
        return executor in self._idle

    def note_out(self, executor: Executor, *, suspended: bool = False) -> None:
        """Notes that an executor is lost or suspended."""
        self._out.add(executor)
        if suspended:
            self._idle.add(executor)

    def note_back(self, executor: Executor) -> None:
        """Notes that an executor can run batches again."""
        self._out.discard(executor)
        if executor in self._idle:
            self._idle.discard(executor)
        else:
            self.restarts += 1


def is_lost(executor: Executor) -> bool:
    """Returns whether an executor must be restored before it can run a batch."""
    return isinstance(executor, Supervised) and executor.lost
