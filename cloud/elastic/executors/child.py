"""The process of a ``ProcessExecutor``: opens the model, then runs batches until its input ends. See ``process.py``."""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from typing import Any, BinaryIO, Final

import torch

from isthmus.cloud.elastic.executors.memory import BatchMemory
from isthmus.cloud.elastic.executors.opening import Opening, check, opened
from isthmus.cloud.elastic.model.runner import ElasticRunner, ServedTask
from isthmus.cloud.elastic.model.weights import ModelError
from isthmus.cloud.elastic.tasks.task import TaskWeights

MAX_TEXT_CHARS: Final = 8_000

_Message = dict[str, Any]


def main() -> None:
    # Ctrl-C reaches all processes of the terminal; the server decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Replies have the pipe for themselves: what a library prints goes to the server's standard error.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    heard: queue.SimpleQueue[_Message] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, heard), name="input", daemon=True).start()
    serve(heard, replies, int(sys.argv[1]))
    os._exit(1)  # the model cannot be opened


def serve(heard: "queue.SimpleQueue[_Message]", replies: BinaryIO, fd: int) -> None:
    """Answers messages for ever, unless the model cannot be opened. The thread that listens ends the process."""

    def say(message: _Message) -> None:
        replies.write(json.dumps(message).encode() + b"\n")
        replies.flush()

    hello = heard.get()
    try:
        opening = Opening.from_json(json.dumps(hello["open"]))
        torch.set_num_threads(opening.threads)
        runner = opened(opening)
        check(runner)
        memory = BatchMemory.inherited(fd, hello["image_px"])
    except (ModelError, ValueError, RuntimeError, OSError) as error:
        say({"failed": str(error)[:MAX_TEXT_CHARS]})
        return
    say({"ready": True})
    work = _Work(runner, memory)
    while True:
        message = heard.get()
        try:
            work.perform(message)
        except Exception:
            say({"failed": traceback.format_exc()[-MAX_TEXT_CHARS:]})
        else:
            say({"done": True})


class _Work:
    def __init__(self, runner: ElasticRunner, memory: BatchMemory) -> None:
        self._runner = runner
        self._memory = memory
        self._shape = runner.model.shape
        self._tasks: dict[int, ServedTask] = {}

    def perform(self, message: _Message) -> None:
        if "task" in message:
            data = self._memory.weights(message["bytes"]).tobytes()
            weights = TaskWeights.from_bytes(data, classes=message["classes"], model=self._shape)
            self._tasks[message["task"]] = self._runner.prepare(weights, message["mode"])
            return
        for number in message["drop"]:
            self._tasks.pop(number, None)
        pictures = self._memory.pixels(tuple(message["shape"]), message["dtype"])
        tasks = [self._tasks[number] for number in message["tasks"]]
        logits = self._runner.answer(pictures, message["run"], tasks)
        answers = self._memory.answers(sum(map(len, logits)))
        at = 0
        for logits_C in logits:
            answers[at : at + len(logits_C)] = logits_C
            at += len(logits_C)


def _listen(stdin: BinaryIO, heard: "queue.SimpleQueue[_Message]") -> None:
    try:
        while line := stdin.readline():
            heard.put(json.loads(line))
    finally:
        # The server has ended or wants this process to end. Nothing here outlives a batch.
        os._exit(0)


if __name__ == "__main__":
    main()
