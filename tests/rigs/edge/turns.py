"""Simulated time for threads: they take turns, so the same threads give the same run again."""

import threading
from collections.abc import Callable

from isthmus.edge.agent.live import Worker


class Killed(BaseException):
    """The process is killed. No handler of errors may catch it."""


class Turns:
    """Simulated time. Of all threads one runs, until it sleeps; then the one that wakes first."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.unix_jump_s = 0.0
        self.killed_at_s = float("inf")
        self._changed = threading.Condition()
        self._turn: threading.Thread = threading.current_thread()
        self._wakes: dict[threading.Thread, tuple[float, int]] = {self._turn: (0.0, 0)}
        self._count = 0
        self._dead = False

    def clock(self) -> float:
        self.now_s += 1e-5  # reading it takes time, so nothing can wait for it in a loop without end
        return self.now_s

    def unix(self) -> float:
        return 1.7e9 + self.now_s + self.unix_jump_s

    def sleep(self, seconds: float) -> None:
        """Let the other threads run for ``seconds``. Raises Killed at the end of the process."""
        me = threading.current_thread()
        with self._changed:
            self._count += 1
            self._wakes[me] = (self.now_s + max(0.0, seconds), self._count)
            self._pass_on()
            while self._turn is not me and not self._dead:
                self._changed.wait()
            if self._dead or self.now_s >= self.killed_at_s:
                self._dead = True
                self._changed.notify_all()
                raise Killed

    def add(self, thread: threading.Thread) -> None:
        with self._changed:
            self._count += 1
            self._wakes[thread] = (self.now_s, self._count)

    def begin(self) -> None:
        """Wait for the first turn of this thread."""
        with self._changed:
            while self._turn is not threading.current_thread() and not self._dead:
                self._changed.wait()
            if self._dead:
                raise Killed

    def leave(self) -> None:
        with self._changed:
            self._wakes.pop(threading.current_thread(), None)
            if not self._dead:
                self._pass_on()

    def live_again(self, killed_at_s: float) -> None:
        """Start another process, which is killed at that time."""
        self._dead, self.killed_at_s = False, killed_at_s
        self._turn = threading.current_thread()
        self._wakes = {self._turn: (self.now_s, 0)}

    def _pass_on(self) -> None:
        self._turn = min(self._wakes, key=lambda each: self._wakes[each])
        self.now_s = max(self.now_s, self._wakes[self._turn][0])
        self._changed.notify_all()


def turning_worker(turns: Turns) -> type[Worker]:
    """Return the class of a worker whose thread takes turns."""

    class TurningWorker(Worker):
        _busy = False

        @property
        def busy(self) -> bool:
            return self._busy

        def start(self, task: Callable[[], object]) -> None:
            assert not self._busy
            self._busy = True

            def work() -> None:
                try:
                    turns.begin()
                    task()
                except Killed:
                    pass
                except BaseException as error:
                    self._failure = error
                finally:
                    self._busy = False
                    turns.leave()

            self._thread = threading.Thread(target=work, daemon=True)
            turns.add(self._thread)
            self._thread.start()

        def wait(self, most_s: float) -> None:
            if self._thread is not None:
                self._thread.join(60)

    return TurningWorker
