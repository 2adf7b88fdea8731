"""The process of a ``ProcessExecutor``: opens the model, then runs batches until its input ends. See ``process.py``."""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from typing import Any, BinaryIO, Final

from isthmus.cloud.elastic.executors.memory import BatchMemory
from isthmus.cloud.elastic.executors.opening import Opening
from isthmus.cloud.elastic.executors.replica import Replica
from isthmus.cloud.elastic.model.weights import ModelError

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
        replica = Replica(opening)
        memory = BatchMemory.inherited(fd, hello["image_px"])
    except (ModelError, ValueError, RuntimeError, OSError) as error:
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


def perform(replica: Replica, memory: BatchMemory, message: _Message) -> None:
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
