"""The process of a replica: opens the model, says on which port of loopback it listens, and ends with its input."""

import asyncio
import json
import os
import signal
import sys
from typing import Any, BinaryIO, Final

from isthmus.cloud.garbage import spare_what_is_there
from isthmus.cloud.generation.serve.opening import opened
from isthmus.cloud.http.calls import Door
from isthmus.cloud.http.openai import openai_app
from isthmus.cloud.http.server import HttpServer
from isthmus.cloud.replicas.hosted import Opening
from isthmus.proto.errors import IsthmusError

MAX_TEXT_CHARS: Final = 8_000


def main() -> None:
    # Ctrl-C and SIGHUP reach all processes of the terminal; the server decides when this one ends.
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    # What the server hears is said on a pipe of its own: what a library prints goes to the server's standard error.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    opening = Opening.from_json(sys.stdin.buffer.readline().decode())
    try:
        asyncio.run(_serve(opening, out))
    except (IsthmusError, ValueError, OSError, RuntimeError) as error:
        _say(out, {"failed": str(error)[:MAX_TEXT_CHARS]})
        sys.exit(1)


async def _serve(opening: Opening, out: BinaryIO) -> None:
    """Serves until the input ends."""
    async with opened(opening.settings) as found:
        app = openai_app(found.answering, Door(opening.key), moves=found.moves, move_key=opening.key)
        server = HttpServer(app, "127.0.0.1", 0)
        try:
            port = await server.start()
            spare_what_is_there()
            _say(out, {"port": port})
            # A thread that waits for the input would keep the process from ending.
            ended = asyncio.Event()
            asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
            await ended.wait()
        finally:
            await server.stop()


def _say(out: BinaryIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message).encode() + b"\n")
    out.flush()


if __name__ == "__main__":
    main()
