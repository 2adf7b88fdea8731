"""The process of a ``ProcessExecutor``: opens the model, then runs batches until its input ends. See ``process.py``.

Libraries and model are loaded on a thread of lower priority. A process that takes the place of a killed one then takes
what the other executors leave of the processor. Batches run on the first thread, at the server's own priority.
"""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO, Final

if TYPE_CHECKING:
    from isthmus.cloud.elastic.executors.memory import BatchMemory
    from isthmus.cloud.elastic.executors.replica import Replica

MAX_TEXT_CHARS: Final = 8_000
START_NICER: Final = 5
"""How much nicer the process is while it starts: it then weighs a third of a running executor."""

_Message = dict[str, Any]


class CannotOpen(Exception):
    """The model cannot be opened here. The message is for the server."""


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
        with ThreadPoolExecutor(1, "start", initializer=_step_back) as starting:
            replica, memory = starting.submit(_opened, hello, fd).result()
    except CannotOpen as error:
        say({"failed": str(error)[:MAX_TEXT_CHARS]})
        return
    say({"ready": True})
    while True:
        message = heard.get()
        try:
            perform(replica, memory, message)
        except Exception:
            say({"failed": traceback.format_exc()[-MAX_TEXT_CHARS:]})
        else:
            say({"done": True})


def _step_back() -> None:
    """Make the current thread nicer. Only Linux has priorities per thread; no thread may take its own back."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + START_NICER)


def _opened(hello: _Message, fd: int) -> "tuple[Replica, BatchMemory]":
    """Import the libraries, open the model and the shared memory. Raises CannotOpen."""
    from isthmus.cloud.elastic.executors.memory import BatchMemory
    from isthmus.cloud.elastic.executors.opening import Opening
    from isthmus.cloud.elastic.executors.replica import Replica
    from isthmus.cloud.elastic.model.weights import ModelError
    from isthmus.cloud.garbage import spare_what_is_there

    try:
        opening = Opening.from_json(json.dumps(hello["open"]))
        made = Replica(opening), BatchMemory.inherited(fd, hello["image_px"])
    except (ModelError, ValueError, RuntimeError, OSError) as error:
        raise CannotOpen(str(error)) from error
    spare_what_is_there()
    return made


def perform(replica: "Replica", memory: "BatchMemory", message: _Message) -> None:
    """Does what one message asks for. Answers are in ``memory`` then."""
    if "task" in message:
        weights = memory.weights(message["bytes"]).tobytes()
        replica.prepare(message["task"], weights, message["classes"], message["mode"])
        return
    pictures = memory.pixels(tuple(message["shape"]), message["dtype"])
    logits = replica.run(pictures, message["run"], message["tasks"], message["drop"])
    memory.answers(len(logits))[...] = logits


def _listen(stdin: BinaryIO, heard: "queue.SimpleQueue[_Message]") -> None:
    try:
        while line := stdin.readline():
            heard.put(json.loads(line))
    finally:
        # The server has ended or wants this process to end. Nothing here outlives a batch.
        os._exit(0)


if __name__ == "__main__":
    main()
