"""Reports to the service manager that started this process: ready, alive, what it does, stopping.

systemd's protocol (sd_notify(3)): datagrams to the socket that NOTIFY_SOCKET names. Without that variable nothing is
sent. If WATCHDOG_USEC is set, the manager restarts a process that has not reported to be alive for so long.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from typing import Final

MOST_STATUS: Final = 200
"""Characters of a status, which is one line."""


class ServiceManager:
    """Reports to the manager that ``environment`` names, if any. A manager that does not read blocks nothing.

    >>> ServiceManager({}, lambda: 0.0).alive()
    """

    def __init__(self, environment: Mapping[str, str], clock: Callable[[], float]) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        meant = environment.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
        microseconds = environment.get("WATCHDOG_USEC", "")
        self._every_s = int(microseconds) / 4e6 if meant and microseconds.isdigit() else None
        self._clock = clock
        self._alive_s: float | None = None
        self._status = ""

    def ready(self) -> None:
        """The process has started and does its work."""
        self._send("READY=1")
        self.alive()

    def alive(self) -> None:
        """The main loop has come round once more. Sent four times per period of the watchdog, however often called."""
        now_s = self._clock()
        if self._every_s is None or (self._alive_s is not None and now_s < self._alive_s + self._every_s):
            return
        self._alive_s = now_s
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """Say in one line what the process does, for a person. The same line is sent once."""
        line = " ".join(text.split())[:MOST_STATUS]
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def stopping(self) -> None:
        """The process is about to end."""
        self._send("STOPPING=1")

    def _send(self, message: str) -> None:
        if not self._address.startswith(("/", "@")):
            return
        # A leading @ stands for the null byte of an abstract socket.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.setblocking(False)
            out.sendto(message.encode(), address)
