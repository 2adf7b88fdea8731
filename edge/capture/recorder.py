"""The child process that captures: ``python -m isthmus.edge.capture.recorder CAMERA MICROPHONE RATE_HZ``.

It writes records to its standard output until that is closed. Drivers of cameras hang, freeze and crash, so they have a
process of their own that the device can kill. A source that is missing is reported once, and tried again.
"""

import contextlib
import fcntl
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Final

from isthmus.edge.capture.assembly import Block, StampedPicture
from isthmus.edge.capture.cameras import PICTURES_PER_S, open_camera
from isthmus.edge.capture.microphones import open_microphone
from isthmus.edge.capture.records import Note, Record, Source, packed
from isthmus.edge.capture.sources import CaptureUnavailable

AGAIN_S: Final = 2.0
PIPE_BYTES: Final = 1 << 20
"""A picture then fits into the pipe whole, and wakes its reader once and not eight times."""
NO_CAMERA: Final = "none"


def main(camera: str, microphone: str, rate_hz: int) -> None:
    """Capture until the reader of the standard output has gone."""
    # Libraries print to the standard output, too; the records need it for themselves.
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _widen(pipe)
    waiting: queue.Queue[Record] = queue.Queue(maxsize=64)

    def tell(record: Record) -> None:
        # A reader that is slow loses records, and never delays the sound card.
        with contextlib.suppress(queue.Full):
            waiting.put_nowait(record)

    if camera != NO_CAMERA:
        threading.Thread(target=_film, args=(camera, tell), daemon=True).start()
    threading.Thread(target=_listen, args=(microphone, rate_hz, tell), daemon=True).start()
    with contextlib.suppress(BrokenPipeError), pipe:
        while True:
            pipe.write(packed(waiting.get()))
            pipe.flush()


def _widen(pipe: IO[bytes]) -> None:
    # Not every system can, and a user may have too many large pipes already: a narrow one does as well.
    with contextlib.suppress(AttributeError, OSError):
        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _film(which: str, tell: Callable[[Record], None]) -> None:
    said = ""
    while True:
        try:
            camera = open_camera(which)
            try:
                if said:
                    tell(Note(Source.CAMERA, ""))
                said, due_s = "", time.monotonic()
                while True:
                    picture_HWC = camera.read()
                    now_s = time.monotonic()
                    if now_s >= due_s:
                        tell(StampedPicture(now_s, picture_HWC))
                        due_s = max(due_s + 1 / PICTURES_PER_S, now_s - 1.0)
            finally:
                camera.close()
        except CaptureUnavailable as error:
            if str(error) != said:
                said = str(error)
                tell(Note(Source.CAMERA, said))
            time.sleep(AGAIN_S)


def _listen(which: str, rate_hz: int, tell: Callable[[Record], None]) -> None:
    said = ""
    while True:
        try:
            opened = open_microphone(which, rate_hz, lambda at_s, rate, samples_T: tell(Block(at_s, rate, samples_T)))
        except CaptureUnavailable as error:
            if str(error) != said:
                said = str(error)
                tell(Note(Source.MICROPHONE, said))
            time.sleep(AGAIN_S)
            continue
        if said:
            tell(Note(Source.MICROPHONE, ""))
        if opened is not None:
            threading.Event().wait()
        return


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
