"""A student in a browser: the answers are Python's, and once camera and microphone are open nothing leaves the page.

The student is exported from torch in real size; Chromium's fake camera and microphone play the film and the sound of a
synthetic person. Screenshots are written to the folder that ISTHMUS_SCREENSHOTS names, else to the test's own.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the page needs isthmus[page]")
pytest.importorskip("torch", reason="the student of this test is exported from torch")

from isthmus.data.transforms import InputSpec, evaluation_frames, spectrogram, stored_frame
from isthmus.edge.student.encoder import StudentEncoder
from isthmus.proto.messages import Features, FloatArray, StudentManifest
from tests.rigs.edge.fake_devices import device_with_student, fake_devices, write_y4m
from tests.rigs.edge.household import chromium, ended, make_actor, started
from tests.rigs.edge.scene import speech
from tests.rigs.project.system import missing

PATIENCE_MS = 120_000
SIDE = 240
BLANK = (
    "(canvas) => !canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some((level) => level)"
)
LOAD_A_PICTURE = """
() => new Promise((done) => {
  const one = new Image();
  one.onerror = one.onload = done;
  one.src = "./picture.png?1";
})
"""
ASK_THE_WORKER = """
async ({clips, models}) => {
  const bytes = async (path) => (await fetch(path)).arrayBuffer();
  const held = {};
  for (const name of models) held[name] = await bytes(`./api/student/${name}.onnx`);
  const worker = new Worker("./student.js", {type: "module"});
  const ask = (wanted) => new Promise((done, failed) => {
    worker.onmessage = (event) => event.data.kind === "failed" ? failed(new Error(event.data.text)) : done(event.data);
    worker.postMessage(wanted);
  });
  await ask({kind: "open", wasm: await bytes("./ort-wasm-simd-threaded.wasm"), models: held});
  const made = [];
  for (const [number, {sound, pictures}] of clips.entries()) {
    const answer = await ask({kind: "clip", number, sound: sound && Float32Array.from(sound),
      pictures: pictures && pictures.map(({side, levels}) => ({side, levels: Uint8Array.from(levels)}))});
    made.push({...answer, spectrogram: answer.spectrogram && Array.from(answer.spectrogram)});
  }
  worker.terminate();
  return made;
}
"""

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@dataclass
class Place:
    """``address``: of the page of a device that has ``manifest``'s student. ``picture_HWC``: what the camera shows."""

    address: str
    manifest: StudentManifest
    encoder: StudentEncoder
    picture_HWC: Any
    browser: Any
    pictures: Path

    @property
    def spec(self) -> InputSpec:
        return InputSpec.from_json(self.manifest.input_spec_json)

    def features(self, waveform_T: FloatArray | None, pictures: list[Any] | None) -> Features:
        """Return Python's features of a clip."""
        spec, frames_KCHW = self.spec, None
        if pictures is not None:
            kept = [
                evaluation_frames(np.stack([stored_frame(each, spec)] * spec.frames_stored), spec) for each in pictures
            ]
            frames_KCHW = np.stack([frames_KCHW[0] for frames_KCHW in kept])
        spectrogram_FT = None if waveform_T is None else spectrogram(waveform_T, spec)
        return self.encoder.features(spectrogram_FT, frames_KCHW)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("browser")
    manifest = device_with_student(folder)
    _, sound = make_actor(folder)
    picture_HWC = face_of(folder)
    film = folder / "film.y4m"
    write_y4m(film, [picture_HWC] * 20, 10)
    pictures = Path(os.environ.get("ISTHMUS_SCREENSHOTS") or folder / "screenshots")
    pictures.mkdir(parents=True, exist_ok=True)
    with page_of(folder) as address, chromium(*fake_devices(film, sound)) as browser:
        encoder = StudentEncoder(folder / "device" / "students" / "current")
        yield Place(address, manifest, encoder, picture_HWC, browser, pictures)


@contextmanager
def page_of(folder: Path) -> Iterator[str]:
    """Serve the page of the device in ``folder`` until the block ends; yield its address."""
    page = started(["edge", "page", "--state", folder / "device", "--port", 0], folder / "page.log")
    try:
        assert page.stdout is not None
        address = page.stdout.readline().split()[-1]
        assert address.startswith("http://127.0.0.1:"), (folder / "page.log").read_text()
        yield address
    finally:
        ended(page)


def face_of(folder: Path) -> Any:
    """Return one picture of the synthetic person, of even sides."""
    from isthmus.data.layouts.listing import read_listing
    from isthmus.data.media.decode import decode

    ref = read_listing(folder / "set").refs[0]
    clip = decode(ref, InputSpec(stored_px=SIDE, frame_px=64, frames_stored=3))
    assert clip.frames_KHWC is not None
    return clip.frames_KHWC[1]


@dataclass
class Visit:
    """The page of the student in the browser, what it asked for, and what went wrong on it."""

    place: Place
    width: int = 1280
    allowed: tuple[str, ...] = ("camera", "microphone")
    before: str = ""
    asked: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)

    def __enter__(self) -> "Visit":
        self.context = self.place.browser.new_context(
            viewport={"width": self.width, "height": 900}, reduced_motion="reduce"
        )
        self.context.grant_permissions(list(self.allowed))
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("console", lambda said: said.type == "error" and self.trouble.append(said.text))
        self.context.on("request", lambda asked: self.asked.append(asked.url))
        self.context.on("response", lambda reply: self.answered.append(reply.url))
        if self.before:
            self.page.add_init_script(self.before)
        self.page.goto(f"{self.place.address}browser.html")
        self.page.get_by_role("button", name="Start").wait_for()
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def shows(self, where: str, text: str) -> None:
        self.page.locator(where, has_text=text).first.wait_for()

    def probabilities(self) -> list[int]:
        """Return the probabilities that are shown, in percent."""
        label = self.page.locator("section[aria-label=Answer] svg").get_attribute("aria-label")
        return [int(number) for number in re.findall(r"(\d+) %", label)]


def test_the_worker_answers_as_python_does(place: Place) -> None:
    check_worker(place, 5e-3)


def test_the_worker_answers_as_python_does_with_a_student_in_int8(place: Place, tmp_path: Path) -> None:
    """Students are int8 by default. A level of an activation may be rounded the other way, and others follow it."""
    manifest = device_with_student(tmp_path, "smoke", int8=True)
    with page_of(tmp_path) as address:
        encoder = StudentEncoder(tmp_path / "device" / "students" / "current")
        check_worker(replace(place, address=address, manifest=manifest, encoder=encoder), 5e-2)


def check_worker(place: Place, most_error: float) -> None:
    """Compare the features and answers of the browser with Python's, and the spectrograms."""
    spec, rng = place.spec, np.random.default_rng(1)
    voice_T = speech(spec.duration_s)[: spec.samples]
    noise_T = rng.normal(0, 0.1, spec.samples).astype(np.float32)
    other_HWC = rng.integers(0, 256, (111, 111, 3), dtype=np.uint8)
    pictures = [place.picture_HWC] * (spec.frames_used - 1) + [other_HWC]
    clips: list[tuple[Any, Any]] = [(voice_T, pictures), (noise_T, None), (None, pictures), (noise_T, pictures)]
    with Visit(place) as visit:
        given = [
            {
                "sound": None if sound_T is None else sound_T.tolist(),
                "pictures": seen and [{"side": each.shape[0], "levels": each.ravel().tolist()} for each in seen],
            }
            for sound_T, seen in clips
        ]
        models = ["spectrogram", "picture", "audio_encoder", "visual_encoder", "local_head"]
        made = visit.page.evaluate(ASK_THE_WORKER, {"clips": given, "models": models})
        assert not visit.trouble
    for (sound_T, seen), answer in zip(clips, made, strict=True):
        features = place.features(sound_T, seen)
        if sound_T is not None:
            shown_FT = np.array(answer["spectrogram"]).reshape(spec.spectrogram_bins, spec.spectrogram_columns)
            assert np.abs(shown_FT - spectrogram(sound_T, spec)).max() < 1e-3
        for expected_D, found in zip(features.filled(), answer["features"], strict=True):
            assert np.linalg.norm(expected_D - found) <= most_error * max(np.linalg.norm(expected_D), 1e-9)
        expected_C = place.encoder.local_probabilities(features)
        assert np.abs(expected_C - answer["probabilities"]).max() < most_error / 2


def test_a_person_starts_it_and_nothing_leaves_the_page(place: Place) -> None:
    with Visit(place) as visit:
        assert not place_has_camera(visit), "the camera is closed until it is asked for"
        visit.page.get_by_role("button", name="Start").focus()
        visit.page.keyboard.press("Enter")
        visit.shows("#state", "The page has no connection")
        known = len(visit.asked)
        origin = "/".join(place.address.split("/")[:3])
        assert all(url.startswith((origin, "data:", "blob:")) for url in visit.asked)
        visit.shows("section[aria-label=Answer]", "Answered in this browser from sound and picture")
        visit.shows("section[aria-label='Answers over time']", "oldest first")
        for canvas in visit.page.locator("canvas").all():
            assert not canvas.evaluate(BLANK)
        assert 98 <= sum(visit.probabilities()) <= 102
        assert not visit.trouble
        assert len(visit.asked) == known, f"asked after the camera had opened: {visit.asked[known:]}"
        visit.page.get_by_role("button", name="Try to send one byte").click()
        visit.shows("#said", "Your browser refused")
        for attempt in ("fetch('/')", "new WebSocket('ws://127.0.0.1:1/')", "navigator.sendBeacon('/', '1') || fail"):
            refused = visit.page.evaluate(
                f"async () => {{ const told = new Promise((done) => document.addEventListener("
                f"'securitypolicyviolation', () => done('refused'), {{once: true}})); "
                f"try {{ await ({attempt}); }} catch {{}} return told; }}"
            )
            assert refused == "refused", attempt
        visit.page.evaluate(LOAD_A_PICTURE)
        assert len(visit.answered) <= known, f"answered after the camera had opened: {visit.answered[known:]}"
        visit.page.get_by_role("button", name="Stop").click()
        visit.shows("#state", "Camera and microphone are closed")
        visit.page.get_by_role("button", name="Start").click()
        visit.shows("#state", "The student runs in this browser")
        visit.shows("section[aria-label=Answer]", "Answered in this browser from sound and picture")
        assert len(visit.answered) <= known, "starting again needs no connection"


def place_has_camera(visit: Visit) -> bool:
    return bool(visit.page.locator("section[aria-label=Camera]", has_text="The square is what").count())


def test_the_answer_on_the_page_is_pythons(place: Place) -> None:
    with Visit(place, allowed=("camera",)) as visit:
        visit.page.get_by_role("button", name="Start").click()
        visit.shows("#state", "The microphone was not allowed. The picture alone is answered")
        visit.shows("section[aria-label=Answer]", "Answered in this browser from picture")
        shown = visit.probabilities()
        assert not visit.trouble
    expected_C = place.encoder.local_probabilities(place.features(None, [place.picture_HWC] * place.spec.frames_used))
    # The film is YUV with half the colours, so its pixels differ a little from the picture.
    assert np.abs(100 * expected_C - shown).max() <= 4


def test_a_camera_that_is_denied_leaves_the_sound(place: Place) -> None:
    with Visit(place, allowed=("microphone",)) as visit:
        visit.page.get_by_role("button", name="Start").click()
        visit.shows("#state", "The camera was not allowed. The sound alone is answered")
        visit.shows("section[aria-label=Answer]", "Answered in this browser from sound,")
    with Visit(place, allowed=()) as visit:
        visit.page.get_by_role("button", name="Start").click()
        visit.shows("#state", "The camera was not allowed. The microphone was not allowed. Allow one of them")
        assert visit.page.get_by_role("button", name="Start").is_enabled()


def test_a_camera_that_is_pulled_out_leaves_the_sound(place: Place) -> None:
    keep = """
    const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
    navigator.mediaDevices.getUserMedia = async (wanted) => window.given = await ask(wanted);
    """
    pulled = "(kind) => { const [track] = kind === 'video' ? given.getVideoTracks() : given.getAudioTracks();"
    with Visit(place, before=keep) as visit:
        visit.page.get_by_role("button", name="Start").click()
        visit.shows("section[aria-label=Answer]", "from sound and picture")
        # What the browser does if a device has gone: the track ends, and says so.
        visit.page.evaluate(f"{pulled} track.stop(); track.dispatchEvent(new Event('ended')); }}", "video")
        visit.shows("#state", "The camera is gone. The sound alone is answered")
        visit.shows("section[aria-label=Answer]", "from sound,")
        visit.page.evaluate(f"{pulled} track.stop(); track.dispatchEvent(new Event('ended')); }}", "audio")
        visit.shows("#state", "Camera and microphone are gone")
        assert visit.page.get_by_role("button", name="Start").is_enabled()


def test_a_browser_that_joins_no_microphone_to_another_rate_resamples(place: Place) -> None:
    like_firefox = f"""
    const join = AudioContext.prototype.createMediaStreamSource;
    AudioContext.prototype.createMediaStreamSource = function (stream) {{
      if (this.sampleRate === {place.spec.sample_rate_hz}) throw new DOMException("another rate", "NotSupportedError");
      return join.call(this, stream);
    }};
    """
    with Visit(place, allowed=("microphone",), before=like_firefox) as visit:
        visit.page.get_by_role("button", name="Start").click()
        visit.shows("section[aria-label=Answer]", "from sound,")
        assert not visit.page.locator("section[aria-label=Sound] canvas").evaluate(BLANK)


def test_after_stop_and_start_the_sound_is_the_new_microphones_alone(place: Place) -> None:
    counting = """
    const Node = AudioWorkletNode;
    window.sent = [];
    window.AudioWorkletNode = class extends Node {
      constructor(...given) {
        super(...given);
        const place = window.sent.push(0) - 1;
        this.port.addEventListener("message", () => window.sent[place]++);
      }
    };
    """
    with Visit(place, allowed=("microphone",), before=counting) as visit:
        for starts in (1, 2):
            visit.page.get_by_role("button", name="Start").click()
            before = sent(visit, starts, 1)
            after = sent(visit, starts, before[-1] + 20)
            assert after[:-1] == before[:-1], "the microphone that was closed goes on"
            visit.shows("section[aria-label=Answer]", "from sound,")
            visit.page.get_by_role("button", name="Stop").click()
        assert not visit.trouble


def sent(visit: Visit, recorders: int, least: int) -> list[int]:
    """Return how many blocks each of so many recorders has sent, once the last one has sent at least ``least``."""
    while len(counts := visit.page.evaluate("sent")) < recorders or counts[-1] < least:
        visit.page.wait_for_timeout(50)
    return list(counts)


def test_it_fits_a_desk_and_a_phone(place: Place) -> None:
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ModuleNotFoundError:
        missing("the check of accessibility needs the package axe-playwright-python")
    for width in (1280, 360):
        with Visit(place, width) as visit:
            found = Axe().run(visit.page).response["violations"]
            assert [(each["id"], each["nodes"][0]["html"]) for each in found] == [], width
            visit.page.get_by_role("button", name="Start").click()
            visit.shows("section[aria-label='Answers over time']", "oldest first")
            assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
            small = "() => [...document.querySelectorAll('a, button')].filter((each) => !each.matches('.skip'))"
            small += ".filter((each) => each.getBoundingClientRect().height < 43.9).length"
            assert visit.page.evaluate(small) == 0
            found = Axe().run(visit.page).response["violations"]
            assert [(each["id"], each["nodes"][0]["html"]) for each in found] == [], width
            visit.page.screenshot(path=str(place.pictures / f"browser-{width}.png"), full_page=False)
