"""Free ports of loopback, for programs that cannot say which port the kernel gave them."""

import fcntl
import os
import socket
import tempfile
from pathlib import Path
from typing import Final

_FIRST: Final = 20_000
_COUNT: Final = 10_000
"""Linux gives ports from 32768 on to those who ask for any. A port below is given to nobody between call and use."""


def free_port() -> int:
    """Return a port on which nobody listens. No other test of this machine is given the same one soon."""
    with (Path(tempfile.gettempdir()) / f"isthmus-test-ports-{os.getuid()}").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        given = int(file.read() or 0)
        for _ in range(_COUNT):
            given = (given + 1) % _COUNT
            with socket.socket() as probe:
                try:
                    probe.bind(("127.0.0.1", _FIRST + given))
                except OSError:
                    continue
            file.truncate(0)
            file.write(str(given))
            return _FIRST + given
    raise RuntimeError(f"every port from {_FIRST} to {_FIRST + _COUNT} is taken")
