"""Answers every message, streamed or alone, with its own bytes. It shows gRPC's own speed on this machine.

python tests/bench/echo.py PORT_FILE
"""

import asyncio
import signal
import sys
from pathlib import Path

from isthmus.cloud.load.echo import serve


async def main(port_file: Path) -> None:
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    await serve(port_file, stop.wait)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
