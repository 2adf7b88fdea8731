"""The student on ONNX Runtime: from a clip to features, from features to probabilities.

Axes: N clips, B batch, D feature width, W compressed width, C classes, F T spectrogram, K frames, H W pixels.
"""

import functools
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isthmus.data.memory import give_back, keep_little
from isthmus.proto.errors import Corrupt, Internal
from isthmus.proto.messages import Features, FloatArray, StudentManifest, compressed_width, ratio_name

if TYPE_CHECKING:  # A trial of a student starts a process that imports this module; it needs no decoders.
    from isthmus.data.transforms import InputSpec
    from isthmus.edge.capture.sources import Clock, Taken

AUDIO_ENCODER = "audio_encoder.onnx"
VISUAL_ENCODER = "visual_encoder.onnx"
TEACHER_HEAD = "teacher_head.onnx"
LOCAL_HEAD = "local_head.onnx"

_PROBE_TIMEOUT_S = 120


@dataclass(frozen=True)
class Encoded:
    """A clip's features, and the milliseconds that decoding and encoding took."""

    name: str
    label: int | None
    features: Features
    decode_ms: float
    encode_ms: float


class RuntimeUnusable(Internal):
    """ONNX Runtime cannot run on this device."""


@functools.cache
def probe_runtime(python: str = sys.executable) -> None:
    """Import onnxruntime in a process of its own, once: some builds crash on old ARM cores (illegal instruction).

    Raises RuntimeUnusable with the way out. A crash in a subprocess does not end the agent.
    """
    probe = subprocess.run(
        [python, "-P", "-c", "import onnxruntime"],
        capture_output=True,
        text=True,
        timeout=_PROBE_TIMEOUT_S,
        check=False,
    )
    if probe.returncode == -signal.SIGILL:
        raise RuntimeUnusable(
            "onnxruntime crashes with an illegal instruction on this processor: its wheel is built for a newer one. "
            "Install an onnxruntime built for this board (for example an older version, or your distribution's)."
        )
    if probe.returncode != 0:
        last_line = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeUnusable(f"onnxruntime cannot be imported ({last_line}): pip install 'isthmus[edge]'")


class StudentEncoder:
    """The ONNX files of a student's folder (named in ``StudentManifest``), each loaded at its first use.

    ``threads`` is ONNX Runtime's intra-op count; 1 is fastest on a small, busy machine. Without ``probe`` the
    caller has made sure that ONNX Runtime runs. Raises RuntimeUnusable if ONNX
    Runtime does not run, Corrupt for a file that is missing, does not load, or gives NaN or no distribution.

    >>> export_student(release, release.student(), None, folder / "student")[0].name
    'audio_encoder.onnx'
    >>> encoder = StudentEncoder(folder / "student")
    >>> encoder.features(np.zeros((32, 32), np.float32), None).audio_D.shape  # sound alone
    (128,)
    """

    def __init__(self, folder: Path, *, threads: int = 1, probe: bool = True) -> None:
        if probe:
            probe_runtime()
        keep_little()
        self._folder = folder
        self._threads = threads
        self._sessions: dict[str, Any] = {}

    def features(self, spectrogram_FT: FloatArray | None, frames_KCHW: FloatArray | None) -> Features:
        """Return one clip's uncompressed features. ``frames_KCHW`` are normalised; the result is the mean over K.

        None means not captured: that encoder does not run. Raises ValueError if both are None, Corrupt for NaN.
        """
        audio_D = None if spectrogram_FT is None else self._run(AUDIO_ENCODER, spectrogram_FT[np.newaxis])[0][0]
        visual_D = None if frames_KCHW is None else self._run(VISUAL_ENCODER, frames_KCHW[np.newaxis])[0][0]
        for file, vector_D in ((AUDIO_ENCODER, audio_D), (VISUAL_ENCODER, visual_D)):
            if vector_D is not None and not np.isfinite(vector_D).all():
                raise Corrupt(f"{file} gives values that are not finite")
        return Features(audio_D, visual_D)

    def teacher_probabilities(self, features: Sequence[Features]) -> FloatArray:
        """Return (N, C): the teacher head on the student's features, from which prototypes are made."""
        return self._probabilities(TEACHER_HEAD, features)

    def local_probabilities(self, features: Features) -> FloatArray:
        """Return (C,): the device's own answer, without the cloud. Raises Corrupt for an interim student."""
        probabilities_C: FloatArray = self.local_probabilities_of((features,))[0]
        return probabilities_C

    def local_probabilities_of(self, features: Sequence[Features]) -> FloatArray:
        """Return (N, C): the device's own answers to many clips."""
        return self._probabilities(LOCAL_HEAD, features)

    def compress(self, features: Features, ratio: float) -> Features:
        """Compress to width floor(D / ratio) with the student's module of that ratio. Absent stays absent."""
        audio_D, visual_D = features.filled()
        audio_BW, visual_BW = self._run(
            f"compressor_r{ratio_name(ratio)}.onnx", audio_D[np.newaxis], visual_D[np.newaxis]
        )
        return Features(
            audio_D=None if features.audio_D is None else audio_BW[0],
            visual_D=None if features.visual_D is None else visual_BW[0],
        )

    def _probabilities(self, file: str, features: Sequence[Features]) -> FloatArray:
        audio, visual = zip(*(each.filled() for each in features), strict=True)
        present_N2 = np.stack([each.present_2() for each in features])
        (probabilities_NC,) = self._run(file, np.stack(audio), np.stack(visual), present_N2)
        if not np.isfinite(probabilities_NC).all() or (np.abs(probabilities_NC.sum(axis=-1) - 1) > 1e-3).any():
            raise Corrupt(f"{file} gives values that are not a distribution")
        return probabilities_NC

    def _run(self, file: str, *inputs: FloatArray) -> list[FloatArray]:
        session = self._session(file)
        names = [node.name for node in session.get_inputs()]
        if len(names) != len(inputs):
            raise Corrupt(f"{file} has {len(names)} inputs; {len(inputs)} were expected")
        feed = {name: np.ascontiguousarray(array, np.float32) for name, array in zip(names, inputs, strict=True)}
        try:
            outputs: list[FloatArray] = session.run(None, feed)
        except Exception as error:  # ONNX Runtime's exceptions share no other base.
            raise Corrupt(f"{file} does not run: {_first_line(error)}") from error
        return outputs

    def _session(self, file: str) -> Any:
        session = self._sessions.get(file)
        if session is None:
            import onnxruntime

            path = self._folder / file
            if not path.is_file():
                raise Corrupt(f"this student has no {file}")
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self._threads
            options.inter_op_num_threads = 1
            options.log_severity_level = 3
            try:
                session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime's exceptions share no other base.
                raise Corrupt(f"{file} does not load: {_first_line(error)}") from error
            self._sessions[file] = session
            give_back()
        return session


def encode(encoder: StudentEncoder, taken: "Taken", spec: "InputSpec", clock: "Clock") -> Encoded:
    """Return the clip's features and the time they took; ``spec`` selects the frames."""
    from isthmus.data.transforms import evaluation_frames

    began_s = clock()
    frames_KHWC = taken.clip.frames_KHWC
    frames_KCHW = None if frames_KHWC is None else evaluation_frames(frames_KHWC, spec)
    features = encoder.features(taken.clip.spectrogram_FT, frames_KCHW)
    return Encoded(taken.ref.name, taken.ref.label, features, taken.decode_ms, (clock() - began_s) * 1000)


def check_student(folder: Path, manifest: StudentManifest, clips: Sequence[tuple[FloatArray, FloatArray]]) -> None:
    """Run every model of a student on the clips, complete and with one modality, and check widths and values.

    ``clips`` are pairs (spectrogram_FT, frames_KCHW). Raises Corrupt for a model that does not load, or gives another
    width, a value that is not finite, or no distribution.
    """
    encoder = StudentEncoder(folder, probe=False)
    for spectrogram_FT, frames_KCHW in clips:
        features = encoder.features(spectrogram_FT, frames_KCHW)
        _check_width("encoders", features, manifest.feature_width)
        variants = (features, Features(features.audio_D, None), Features(None, features.visual_D))
        answers = [encoder.teacher_probabilities(variants)]
        if manifest.kind != "interim":
            answers += [encoder.local_probabilities_of(variants)]
            for ratio in manifest.ratios:
                width = compressed_width(manifest.feature_width, ratio)
                _check_width(f"compressor {ratio:g}", encoder.compress(features, ratio), width)
        for probabilities_NC in answers:
            if probabilities_NC.shape != (len(variants), len(manifest.classes)):
                raise Corrupt(f"a head does not give {len(manifest.classes)} probabilities per clip")


def _check_width(part: str, features: Features, width: int) -> None:
    for vector in features.filled():
        if vector.shape != (width,) or not np.isfinite(vector).all():
            raise Corrupt(f"{part}: shape {vector.shape} or a value that is not finite; width {width} was expected")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
