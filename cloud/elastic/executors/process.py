"""An executor in a process of its own: weights, pixels and logits go through shared memory, messages through pipes.

A message is one line of JSON, shorter than a pipe holds, and the process answers each with one line. Nothing is
pickled. There is at most one message in the process, so neither side can queue up work or wait for the other to read.
The process ends when its input ends, so it never outlives the server.
"""

import json
import logging
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import numpy as np

from isthmus.cloud.elastic.executors.memory import BatchMemory
from isthmus.cloud.elastic.executors.numbers import TaskNumbers, split
from isthmus.cloud.elastic.executors.opening import Opening
from isthmus.cloud.elastic.model.executor import ExecutorLost, Item, alike
from isthmus.cloud.elastic.tasks.task import FloatArray, Task
from isthmus.data.images import PixelSpec

log = logging.getLogger(__name__)

START_S: Final = 600.0
"""Longest time from the start of a process until its model is loaded."""
PATIENCE_S: Final = 60.0
COMPILING_S: Final = 900.0
"""A process is killed if a batch takes longer than this: ``COMPILING_S`` if code is compiled at its first batch."""
END_S: Final = 5.0
MAX_LINE_BYTES: Final = 1 << 16

_Message = dict[str, Any]


class ProcessExecutor:
    """Runs batches in a process (see the module). ``start`` begins to start it, ``restore`` waits until it can run.

    One thread at a time talks to the process. A batch of a process that was killed, or that takes longer than
    ``patience_s``, raises ExecutorLost. Any other failure of a batch raises RuntimeError, and the process goes on.
    """

    def __init__(self, opening: Opening, pixels: PixelSpec, *, patience_s: float | None = None) -> None:
        self._opening = opening
        self._pixels = pixels
        self._patience_s = patience_s or (PATIENCE_S if opening.compiler is None else COMPILING_S)
        self._turn = threading.Lock()
        self._changing = threading.Lock()
        self._changed: Callable[[], None] = lambda: None
        self._child: _Child | None = None
        self._closed = False
        self._numbers = TaskNumbers()

    @property
    def pid(self) -> int | None:
        """The process's id, while there is a process."""
        child = self._child
        return None if child is None or child.gone.is_set() else child.process.pid

    @property
    def lost(self) -> bool:
        child = self._child
        return child is None or not child.ready or child.gone.is_set()

    def watch(self, changed: Callable[[], None]) -> None:
        self._changed = changed

    def start(self) -> None:
        """Starts the process, if there is none, without waiting for it. Raises ExecutorLost."""
        with self._changing:
            if self._closed:
                raise ExecutorLost("the server is stopping")
            if self._child is not None and not self._child.gone.is_set():
                return
            try:
                self._child = _Child(self._opening, self._pixels.size_px, self._lost_one)
            except OSError as error:
                raise ExecutorLost(f"a process cannot be started: {error.strerror}") from error

    def restore(self) -> None:
        with self._turn:
            self.start()
            child = self._child
            if child is not None and not child.ready:
                child.await_model()

    def prepare(self, task: Task) -> None:
        """Gives the process a task, so that its first query does not wait for that. A lost one gets it later."""
        if self.lost:  # being started, which may take long
            return
        with self._turn, suppress(ExecutorLost):
            child = self._child
            if child is not None and not self.lost:
                self._give(child, task)

    def run(self, items: Sequence[Item], gamma: int) -> list[FloatArray]:
        with self._turn:
            child = self._child
            if child is None or self.lost:
                raise ExecutorLost("it is being started again")
            for task in dict.fromkeys(item.task for item in items):
                self._give(child, task)
            images = alike(items, self._pixels)
            shape = (len(images), *images[0].shape)
            dtype = images[0].dtype.name
            np.stack(images, out=child.memory.pixels(shape, dtype))  # type: ignore[arg-type]
            numbers = [self._numbers.of(item.task) for item in items]
            dropped = self._numbers.dropped()
            child.known.difference_update(dropped)
            child.say({"run": gamma, "tasks": numbers, "shape": shape, "dtype": dtype, "drop": dropped})
            child.hear(self._patience_s)
            return split(child.memory.answers(sum(len(item.task.spec.classes) for item in items)).copy(), items)

    def suspend(self) -> None:
        with self._turn, self._changing:
            child, self._child = self._child, None
        if child is not None:
            child.asked_to_end = True
            child.end()

    def close(self) -> None:
        with self._changing:
            self._closed = True
            child, self._child = self._child, None
        if child is not None:
            child.end()

    def _give(self, child: "_Child", task: Task) -> None:
        number = self._numbers.of(task)
        if number not in child.known:
            weights = np.frombuffer(task.weights.to_bytes(), np.uint8)
            child.memory.weights(len(weights))[...] = weights
            classes, mode = len(task.spec.classes), task.spec.prompt_mode
            child.say({"task": number, "bytes": len(weights), "classes": classes, "mode": mode})
            child.hear(self._patience_s)
            child.known.add(number)

    def _lost_one(self, child: "_Child") -> None:
        if child.ready and not self._closed and not child.asked_to_end:
            log.error("the process %d of an executor ended with %s", child.process.pid, child.process.returncode)
        self._changed()


class _Child:
    """One process, and the thread that reads what it says. Raises OSError if it cannot be started."""

    def __init__(self, opening: Opening, image_px: int, on_gone: "Callable[[_Child], None]") -> None:
        self.memory = BatchMemory.create(image_px)
        self.known: set[int] = set()
        self.ready = False
        self.asked_to_end = False
        self.gone = threading.Event()
        self._on_gone = on_gone
        self._heard: queue.SimpleQueue[_Message | None] = queue.SimpleQueue()
        try:
            self.process = subprocess.Popen(
                # -P: a folder named isthmus in the working folder must not take the package's place
                [sys.executable, "-P", "-m", "isthmus.cloud.elastic.executors.child", str(self.memory.fd)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[self.memory.fd],
            )
        except BaseException:
            self.memory.close()
            raise
        self._reader = threading.Thread(target=self._read, name=f"executor-{self.process.pid}", daemon=True)
        self._reader.start()
        self.say({"open": json.loads(opening.to_json()), "image_px": image_px})

    def say(self, message: _Message) -> None:
        """Sends a message. Raises nothing: the end of the process is noticed by the next ``hear``."""
        stdin = self.process.stdin
        assert stdin is not None
        with suppress(OSError, ValueError):
            stdin.write(json.dumps(message).encode() + b"\n")
            stdin.flush()

    def hear(self, patience_s: float) -> _Message:
        """Waits for the next message. Raises ExecutorLost, and RuntimeError if the process says that it failed."""
        try:
            heard = self._heard.get(timeout=patience_s)
        except queue.Empty:
            self.process.kill()
            self.gone.wait(END_S)
            raise ExecutorLost(f"its process gave no answer for {patience_s:g} s and was killed") from None
        if heard is None:
            self._heard.put(None)
            raise ExecutorLost(f"its process ended with {self.process.returncode}")
        if "failed" in heard:
            raise RuntimeError(heard["failed"])
        return heard

    def await_model(self) -> None:
        """Waits until the model is loaded and has run one image. Raises ExecutorLost."""
        try:
            self.hear(START_S)
        except ExecutorLost:
            raise
        except RuntimeError as error:
            self.end()
            raise ExecutorLost(str(error)) from error
        self.ready = True

    def end(self) -> None:
        """Ends the process, and waits until it has ended."""
        self._hang_up()
        if not self.gone.wait(END_S):
            self.process.kill()
            self.gone.wait(END_S)

    def _hang_up(self) -> None:
        assert self.process.stdin is not None
        with suppress(OSError, ValueError):
            self.process.stdin.close()

    def _read(self) -> None:
        stdout = self.process.stdout
        assert stdout is not None
        try:
            while line := stdout.readline(MAX_LINE_BYTES):
                self._heard.put(json.loads(line))
        except ValueError:
            log.exception("an executor's process said something that is no message")
            self.process.kill()
        self.process.wait()
        self._hang_up()
        stdout.close()
        self.memory.close()
        self.gone.set()
        self._heard.put(None)
        self._on_gone(self)
