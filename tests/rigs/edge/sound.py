"""A sound server of one test: PulseAudio with a null sink, whose monitor is PortAudio's default microphone."""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from isthmus.edge.capture.assembly import GAP_S, Block

RATE_HZ = 48_000
_PROGRAMS = ("pulseaudio", "pacat")
_STARTS_S = 60.0
SOCKET = "pulse.sock"
COMMANDS = "pulse.pa"


def missing() -> str:
    """Return what is not installed, with the way to install it; "" if everything is there."""
    absent = [name for name in _PROGRAMS if shutil.which(name) is None]
    absent += ["libportaudio2"] * (not any(Path("/usr/lib").glob("*/libportaudio.so.2")))
    absent += ["libasound2-plugins"] * (not any(Path("/usr/lib").glob("*/alsa-lib/libasound_module_pcm_pulse.so")))
    return f"{', '.join(absent)} are missing: 'make system' installs them" if absent else ""


def seconds_of(blocks: Sequence[Block]) -> float:
    """Return how long the samples of the blocks last."""
    return sum(len(block.samples_T) / block.rate_hz for block in blocks)


def longest_run(blocks: Sequence[Block]) -> list[Block]:
    """Return the longest stretch of blocks of which each begins where the one before ends, give or take GAP_S."""
    runs: list[list[Block]] = [[]]
    for block in blocks:
        before = runs[-1][-1] if runs[-1] else None
        if before is not None and abs(block.at_s - before.at_s - seconds_of([before])) >= GAP_S:
            runs.append([])
        runs[-1].append(block)
    return max(runs, key=seconds_of)


def drift_of(run: Sequence[Block]) -> float:
    """Return how much faster than the count of samples the stamps of a run go: 0.01 is one second in a hundred.

    It is the slope of a line through all stamps (least squares), so single late stamps hardly count.
    """
    counted = np.cumsum([0.0, *(seconds_of([block]) for block in run[:-1])])
    return float(np.polyfit(counted, [block.at_s for block in run], 1)[0]) - 1.0


@dataclass
class SoundServer:
    """A running server. ``environment`` makes ALSA, and so PortAudio, use it."""

    folder: Path
    environment: dict[str, str]
    process: "subprocess.Popen[bytes]"
    _player: "subprocess.Popen[bytes] | None" = None

    def play(self, waveform_T: npt.NDArray[np.float32]) -> None:
        """Play mono samples at RATE_HZ, in place of what is played now."""
        self.stop()
        command = ["pacat", "--device=room", "--format=float32le", f"--rate={RATE_HZ}", "--channels=1"]
        self._player = subprocess.Popen(
            [*command, "--latency-msec=20"], stdin=subprocess.PIPE, env={**os.environ, **self.environment}
        )
        assert self._player.stdin is not None
        content = np.asarray(waveform_T, "<f4").tobytes()
        threading.Thread(target=_feed, args=(self._player.stdin, content), daemon=True).start()

    def stop(self) -> None:
        if self._player is not None:
            self._player.kill()
            self._player.wait()
            self._player = None

    def unplug(self) -> None:
        """Take the microphone away: the server ends, as if its only sound card had been pulled out."""
        self.stop()
        self.process.kill()
        self.process.wait()

    def plug_in(self) -> None:
        """Bring the microphone back: the server starts again."""
        (self.folder / SOCKET).unlink(missing_ok=True)
        self.process = _started(self.folder, self.environment)


def _feed(pipe: IO[bytes], content: bytes) -> None:
    with suppress(OSError):  # it was stopped
        pipe.write(content)
        pipe.close()


def _started(folder: Path, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Start PulseAudio and wait until it can be reached."""
    command = ["pulseaudio", "-n", "--daemonize=no", "--system=false", "--exit-idle-time=-1", "--use-pid-file=no"]
    command += ["--disable-shm=yes", "--high-priority=no", "--realtime=no", "-F", str(folder / COMMANDS)]
    with (folder / "pulse.log").open("ab") as log:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
    deadline_s = time.monotonic() + _STARTS_S
    while not (folder / SOCKET).exists():
        if process.poll() is not None or time.monotonic() > deadline_s:
            process.kill()
            process.wait()
            raise RuntimeError(f"PulseAudio did not start: {(folder / 'pulse.log').read_text()[-500:]}")
        time.sleep(0.05)
    return process


@contextmanager
def sound_server(folder: Path) -> Iterator[SoundServer]:
    """Run a server whose files are in ``folder``. It is this user's own, and no other program knows of it."""
    socket = folder / SOCKET
    if len(str(socket)) > 100:
        raise ValueError(f"{socket}: too long for a socket's path")
    (folder / COMMANDS).write_text(
        f"load-module module-native-protocol-unix socket={socket} auth-anonymous=1\n"
        f"load-module module-null-sink sink_name=room rate={RATE_HZ} channels=1 format=float32le\n"
        "set-default-sink room\nset-default-source room.monitor\n"
    )
    alsa = folder / "asound.conf"
    plugin = f'{{ type pulse server "unix:{socket}" }}'
    alsa.write_text(f"</usr/share/alsa/alsa.conf>\npcm.!default {plugin}\nctl.!default {plugin}\n")
    environment = {
        "XDG_RUNTIME_DIR": str(folder),
        "PULSE_SERVER": f"unix:{socket}",
        "PULSE_RUNTIME_PATH": str(folder),
        "PULSE_STATE_PATH": str(folder),
        "ALSA_CONFIG_PATH": str(alsa),
        "HOME": str(folder),
    }
    server = SoundServer(folder, environment, _started(folder, environment))
    try:
        yield server
    finally:
        server.unplug()
