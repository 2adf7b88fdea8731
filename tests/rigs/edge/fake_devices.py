"""A browser's fake camera and microphone, which play files, and a device's folder with a student of real size."""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.data.cache.read import ClipArrays
from isthmus.distill.student.export import ENCODERS, encoder_inputs
from isthmus.distill.student.int8 import quantise_encoder
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.behaviour.state import Phase
from isthmus.edge.student.slot import StudentSlot
from isthmus.proto.convert_student import manifest_to_bytes
from isthmus.proto.limits import CHUNK_BYTES
from isthmus.proto.messages import Chunk, Enrolment, SignedManifest, StudentFile, StudentManifest
from tests.bench.untrained import CLASSES, encoders_release, export_base
from tests.rigs.data.random_cache import write_clips
from tests.rigs.edge.device import load_test

FAKE = ("--use-fake-device-for-media-stream", "--autoplay-policy=no-user-gesture-required")


def fake_devices(film: Path, sound: Path) -> list[str]:
    """Return Chromium's arguments for a camera that shows a Y4M file and a microphone that plays a WAV file."""
    return [*FAKE, f"--use-file-for-fake-video-capture={film}", f"--use-file-for-fake-audio-capture={sound}"]


def write_y4m(path: Path, frames_KHWC: Sequence[npt.NDArray[np.uint8]], fps: int) -> None:
    """Write RGB pictures of even sides as an uncompressed film, as Chromium's fake camera reads it."""
    height, width = frames_KHWC[0].shape[:2]
    with path.open("wb") as file:
        file.write(f"YUV4MPEG2 W{width} H{height} F{fps}:1 Ip A1:1 C420\n".encode())
        for frame_HWC in frames_KHWC:
            planes = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), "rgb24").reformat(format="yuv420p")
            file.write(b"FRAME\n" + planes.to_ndarray().tobytes())


def device_with_student(folder: Path, preset: str = "small", *, int8: bool = False) -> StudentManifest:
    """Make the folder of a device whose student is exported from torch; return its manifest.

    ``small`` is the real size. With ``int8`` the encoders are quantised, with ranges from random clips.
    """
    release = encoders_release(folder / "release", preset)
    base = export_base(release)
    if int8:
        write_clips(folder / "clips", release.recipe.input, CLASSES, 2)
        clips = ClipArrays.open(folder / "clips")
        for name in ENCODERS:
            quantise_encoder(base / name, base / f"int8.{name}", encoder_inputs(name, clips, 1))
            (base / f"int8.{name}").replace(base / name)
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    files = {path.name: path.read_bytes() for path in sorted(base.glob("*.onnx"))}
    recipe = release.recipe
    manifest = StudentManifest(
        student_id="base-student",
        kind="base",
        files=tuple(StudentFile(name, len(data), sha256(data).digest()) for name, data in files.items()),
        ratios=recipe.ratios,
        classes=CLASSES,
        input_spec_json=recipe.input.to_json(),
        feature_width=recipe.feature_width,
        created_s=1.0,
    )
    state = DeviceState(folder / "device")
    public = key.public_key().public_bytes_raw()
    state.save_enrolment(
        Enrolment("device-1", "token-1", public, CLASSES, manifest.input_spec_json, manifest.feature_width)
    )
    slot = StudentSlot(state.root / "students", public, load_test, device_id="device-1")
    content = manifest_to_bytes(manifest)
    slot.begin(SignedManifest(content, key.sign(content)))
    for file, _ in slot.missing(manifest):
        data = files[file.name]
        starts = range(0, len(data), CHUNK_BYTES)
        slot.receive(manifest, file, [Chunk(start, data[start : start + CHUNK_BYTES], 0) for start in starts])
    slot.verify(manifest.student_id)
    slot.activate(manifest.student_id)
    state.save_agent(replace(state.agent(), phase=Phase.SERVE, active_id=manifest.student_id))
    return manifest
