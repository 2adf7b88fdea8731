"""A device at work with its page: real processes, an actor who plays camera and microphone, a cloud, and a browser."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.data.layouts.listing import read_listing
from isthmus.data.media.decode import decode, decode_sound
from isthmus.data.media.encode import write_mp4, write_wav
from isthmus.data.synthetic.sets import make_crema_d
from isthmus.data.transforms import InputSpec
from isthmus.edge.link.interface import MemoryCloud
from isthmus.proto.messages import PublicMeasure
from tests.conftest import TinyStudents
from tests.rigs.distill.people import person_model
from tests.rigs.edge.memory_service import served
from tests.rigs.edge.wire_tap import Tap, tapped
from tests.rigs.project.patience import HANGS_S
from tests.rigs.project.system import missing

ISTHMUS = (sys.executable, "-P", "-c", "import sys; sys.argv[0] = 'isthmus'; from isthmus.cli import main; main()")
VIEWS = ("now", "mine", "sent", "link")
PICTURE_PX = 240
FPS = 10


class QuickStudents(TinyStudents):
    """Tiny students whose clips last one second."""

    @property
    def spec(self) -> InputSpec:
        return replace(super().spec, duration_s=1.0)

    def cloud(self) -> MemoryCloud:
        """Return a cloud whose base and final students have person models."""
        cloud = super().cloud()
        for seed, kind in ((0, "base"), (2, "final")):
            measured = PublicMeasure(100, 0.8, 0.5, (0.4, 0.3, 0.3))
            cloud.students[kind] = self.signed(kind, kind, self.files(kind, seed), measured, person_model(3, 12, seed))
        return cloud


def make_actor(folder: Path) -> tuple[Path, Path]:
    """Make a film and a sound of one synthetic person in all their moods; return their paths."""
    make_crema_d(folder / "set", actors=1, takes=1, seed=0, difficulty=0.3, progress=False)
    spec = InputSpec(duration_s=2.0, spectrogram_columns=150, stored_px=PICTURE_PX, frame_px=64, frames_stored=2 * FPS)
    frames, sounds = [], []
    for ref in read_listing(folder / "set").refs:
        clip = decode(ref, spec)
        assert clip.frames_KHWC is not None
        frames.append(clip.frames_KHWC)
        sounds.append(decode_sound(ref, spec))
    film, sound = folder / "film.mp4", folder / "sound.wav"
    pictures_KHWC, sound_T = np.concatenate(frames), np.concatenate(sounds)
    write_mp4(film, np.stack([cv2.GaussianBlur(each, (0, 0), 0.8) for each in pictures_KHWC]), FPS, sound_T, 16_000)
    write_wav(sound, sound_T, spec.sample_rate_hz)
    return film, sound


def started(words: Sequence[object], log: Path) -> "subprocess.Popen[str]":
    """Start an ``isthmus`` command; its output goes to a file, but standard output is a pipe."""
    with log.open("a") as file:
        return subprocess.Popen(
            [*ISTHMUS, *map(str, words)], stdout=subprocess.PIPE, stderr=file, text=True, env={**os.environ}
        )


def ended(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    try:
        process.wait(HANGS_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()


@dataclass
class Household:
    """``address``: of the page. ``tap``: on the wire to the cloud."""

    state: Path
    address: str
    tap: Tap
    run: Sequence[object]
    device: "subprocess.Popen[str]" = field(repr=False)
    page: "subprocess.Popen[str] | None" = field(default=None, repr=False)

    def open_page(self, port: int = 0) -> None:
        """Start the page's process, and note its address."""
        log = self.state.parent / "page.log"
        self.page = started(["edge", "page", "--state", self.state, "--port", port], log)
        assert self.page.stdout is not None
        line = self.page.stdout.readline()
        assert "http://127.0.0.1:" in line, log.read_text()
        self.address = line.split()[-1]

    def close_page(self) -> None:
        if self.page is not None:
            ended(self.page)

    def stop_device(self) -> None:
        ended(self.device)

    def start_device(self) -> None:
        self.device = started(self.run, self.state.parent / "device.log")


@contextlib.contextmanager
def household(folder: Path, *, clips_before: int = 6) -> Iterator[Household]:
    """Run cloud, device and page until the block ends."""
    students = QuickStudents(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
    film, sound = make_actor(folder)
    state = folder / "device"
    with served(students.cloud(), threads=8) as (port, _), tapped(port) as tap, contextlib.ExitStack() as stack:
        run = ["edge", "run", "--cloud", f"127.0.0.1:{tap.port}", "--state", state, "--camera", film]
        run += ["--microphone", sound, "--no-gate", "--no-guard", "--clips-before", clips_before]
        run += ["--latency-budget-ms", 2000, "--name", "kiosk"]
        home = Household(state, "", tap, run, started(run, folder / "device.log"))
        stack.callback(lambda: ended(home.device))
        while not (state / "socket").exists():
            assert home.device.poll() is None, (folder / "device.log").read_text()
            with contextlib.suppress(subprocess.TimeoutExpired):
                home.device.wait(0.1)
        stack.callback(lambda: home.close_page())
        home.open_page()
        yield home


@contextlib.contextmanager
def chromium(*arguments: str) -> Iterator[Any]:
    """Yield Debian's Chromium with further arguments, driven by Playwright. Skips the test if either is missing."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        missing("the tests of pages need the package playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        missing("the tests of pages need Chromium (Debian: apt install chromium)")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu", *arguments])
        yield browser
        browser.close()
