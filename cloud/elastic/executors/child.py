"""The process of a ``ProcessExecutor``: opens the model, then runs batches until its input ends. See ``process.py``."""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from isthmus.cloud.elastic.executors.memory import BatchMemory

if TYPE_CHECKING:
    from isthmus.cloud.elastic.executors.replica import Replica

MAX_TEXT_CHARS: Final = 8_000
GENTLE: Final = 5
"""Niceness added while the model is opened. The executors that serve go first: a process starts when one is lost."""

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
        replica = _opened_gently(json.dumps(hello["open"]))
        memory = BatchMemory.inherited(fd, hello["image_px"])
    except (ValueError, RuntimeError, OSError) as error:
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


def _opened_gently(opening: str) -> "Replica":
    """Imports torch and opens the model on a thread that leaves the processor to others; batches run on this one."""
    made: Future[Replica] = Future()

    def open_it() -> None:
        with suppress(OSError):  # on Linux niceness is a thread's own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + GENTLE)
        try:
            from isthmus.cloud.elastic.executors.opening import Opening
            from isthmus.cloud.elastic.executors.replica import Replica

            made.set_result(Replica(Opening.from_json(opening)))
        except BaseException as error:
            made.set_exception(error)

    opener = threading.Thread(target=open_it, name="opening")
    opener.start()
    opener.join()
    return made.result()


def perform(replica: "Replica", memory: BatchMemory, message: _Message) -> None:
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
