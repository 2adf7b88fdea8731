"""Everything that crosses the wire, as frozen dataclasses over numpy. Device and cloud handle no other form.

Axes: K prototypes, C classes, D feature width.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.proto.person import Centred

FloatArray = npt.NDArray[np.float32]


class UploadMode(Enum):
    """What an upload contains, most private first.

    >>> [mode.value for mode in UploadMode]
    ['prototypes', 'probabilities', 'features']
    """

    PROTOTYPES = "prototypes"
    PROBABILITIES = "probabilities"
    FEATURES = "features"


class Stage(Enum):
    QUEUED = "queued"
    SELECTING = "selecting"
    DISTILLING = "distilling"
    AWAITING_PROTOTYPES = "awaiting_prototypes"
    COMPRESSING = "compressing"
    EXPORTING = "exporting"
    READY = "ready"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        return self in (Stage.READY, Stage.FAILED)


class NumberType(Enum):
    """The number type of one feature value on the wire."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


@dataclass(frozen=True)
class Prototypes:
    """Centroids of class probabilities. Rows of ``values_KC`` sum to 1; ``sizes_K`` counts the clips of each row.

    ``features_KE`` is set in mode FEATURES only: the means of the student's features over the same clips, with
    E = 2 D, audio then visual. ``epsilon`` is the privacy budget of the noise; None if there is no noise.

    >>> values_KC = np.array([[0.7, 0.3]], np.float32)
    >>> Prototypes(values_KC, np.array([4], np.int32), UploadMode.PROTOTYPES, min_cluster=3).sizes_K.tolist()
    [4]
    """

    values_KC: FloatArray
    sizes_K: npt.NDArray[np.int32]
    mode: UploadMode
    min_cluster: int
    epsilon: float | None = None
    features_KE: FloatArray | None = None


class Captured(Enum):
    """Which modalities a clip has."""

    BOTH = "both"
    SOUND = "sound"
    PICTURE = "picture"


@dataclass(frozen=True)
class Features:
    """A clip's features, one vector per modality. None means that the modality was not captured.

    The width is D, or floor(D / ratio) after compression. Raises ValueError if both are None.

    >>> Features(np.zeros(512, np.float32), None).visual_D is None
    True
    """

    audio_D: FloatArray | None
    visual_D: FloatArray | None

    def __post_init__(self) -> None:
        if self.audio_D is None and self.visual_D is None:
            raise ValueError("a clip without sound and without picture has no features")

    @property
    def captured(self) -> Captured:
        if self.visual_D is None:
            return Captured.SOUND
        return Captured.PICTURE if self.audio_D is None else Captured.BOTH

    def filled(self) -> tuple[FloatArray, FloatArray]:
        """Return both vectors, zeros for an absent one: the input of a head, together with ``present_2``."""
        known = self.audio_D if self.audio_D is not None else self.visual_D
        zeros = np.zeros_like(known, np.float32)
        return (
            zeros if self.audio_D is None else self.audio_D,
            zeros if self.visual_D is None else self.visual_D,
        )

    def present_2(self) -> FloatArray:
        """Return (2,): 1 for a captured modality and 0 for an absent one, sound then picture."""
        return np.array([self.audio_D is not None, self.visual_D is not None], np.float32)


@dataclass(frozen=True)
class FeatureFrame:
    """Features on the wire: the codec packs and unpacks this."""

    features: Features
    ratio: float
    number_type: NumberType


@dataclass(frozen=True)
class Enrolment:
    """A device's identity, and what it must know of the cloud's students. ``token`` is secret."""

    device_id: str
    token: str
    signing_public_key: bytes
    classes: tuple[str, ...]
    input_spec_json: str
    feature_width: int
    rounds: int = 0
    """Rounds of a personalisation by the cloud's recipe; 0 if the cloud does not say."""

    def __repr__(self) -> str:
        return f"Enrolment(device_id={self.device_id!r}, token=<secret>, classes={self.classes!r})"


@dataclass(frozen=True)
class JobStatus:
    job_id: str
    stage: Stage
    round: int = 0
    rounds: int = 1
    epoch: int = 0
    epochs: int = 0
    progress: float = 0.0
    eta_s: float = 0.0
    student_id: str = ""
    selected_per_class: tuple[int, ...] = ()
    stage_seconds: dict[str, float] = field(default_factory=dict)
    error: str = ""
    settled: bool = False
    """The selection settled before the last round, so the cloud skips the remaining rounds."""


@dataclass(frozen=True)
class StudentPatch:
    """A patch that turns the file with SHA-256 ``base_sha256`` into a student's file (see patch.py)."""

    base_sha256: bytes
    size_bytes: int
    sha256: bytes


@dataclass(frozen=True)
class StudentFile:
    """One file of a student. ``patch`` gives the same bytes for fewer, to a device that has the base; it is fetched
    as ``patch_name(name)``."""

    name: str
    size_bytes: int
    sha256: bytes
    patch: StudentPatch | None = None


@dataclass(frozen=True)
class PublicMeasure:
    """The cloud's measurement of a student's local head on ``clips`` labelled public clips.

    ``atc_threshold`` is the confidence above which the share of those clips equals ``accuracy``
    (edge/own_clips/guard.py). ``class_shares`` are the shares of the classes among the clips that the heads were
    trained on; they sum to 1 (edge/own_clips/habits.py) and are empty if those clips were a selection.
    ``ratio_accuracies``: accuracy of the cloud's head per ratio of the student, on the same clips; empty if unknown.
    """

    clips: int
    accuracy: float
    atc_threshold: float
    class_shares: tuple[float, ...] = ()
    ratio_accuracies: tuple[float, ...] = ()


@dataclass(frozen=True)
class StudentManifest:
    """The parts of a student. ``kind`` is "base", "interim" or "final".

    File names (all float32 ONNX, batch axis B free):
      audio_encoder.onnx    spectrogram_BFT -> features_BD
      visual_encoder.onnx   frames_BKCHW (K frames, normalised) -> features_BD, the mean over frames
      teacher_head.onnx     audio_BD, visual_BD, present_B2 -> probabilities_BC   (makes the prototypes)
      local_head.onnx       audio_BD, visual_BD, present_B2 -> probabilities_BC   (answers without the cloud; "base" and
                            "final"); present_B2 is 1 or 0 for sound and picture; an absent one has zero features
      compressor_r<ratio>.onnx   audio_BD, visual_BD -> audio_BW, visual_BW with W = floor(D / ratio); <ratio> as
                            in ``ratio_name``
    ``centred`` is the student's person model (person.py); None if the public clips do not show how people differ.
    ``version`` increases with every student of a device, and with every base student; 0: signed by version 0.1.
    ``expires_s``: Unix time after which no device fetches by this manifest; 0 for never. ``device_id``: the only device
    that may use the student, "" for any. ``release``: the id of the release that it is of, "" if that is unknown.
    """

    student_id: str
    kind: str
    files: tuple[StudentFile, ...]
    ratios: tuple[float, ...]
    classes: tuple[str, ...]
    input_spec_json: str
    feature_width: int
    created_s: float
    measured: PublicMeasure | None = None
    centred: Centred | None = None
    version: int = 0
    expires_s: float = 0.0
    device_id: str = ""
    release: str = ""


@dataclass(frozen=True)
class KeyChange:
    """The cloud signs with ``next_key`` instead of ``previous_key`` (Ed25519 public keys) from ``changed_s`` on."""

    previous_key: bytes
    next_key: bytes
    changed_s: float


@dataclass(frozen=True)
class SignedKeyChange:
    """The exact bytes of a change and the signatures of both keys over ``KEY_CHANGE_CONTEXT`` and these bytes."""

    change_bytes: bytes
    previous_signature: bytes
    next_signature: bytes


KEY_CHANGE_CONTEXT: Final = b"isthmus key change\0"
"""Signed before the bytes of a change, so that no signature of a manifest can pass for one of a change."""


@dataclass(frozen=True)
class SignedManifest:
    """The manifest's exact bytes and their signature. Verify the signature before you parse the bytes.

    ``key_changes``: every change of the cloud's signing key, oldest first.
    """

    manifest_bytes: bytes
    signature: bytes
    key_changes: tuple[SignedKeyChange, ...] = ()


@dataclass(frozen=True)
class Chunk:
    offset_bytes: int
    data: bytes
    crc32: int


@dataclass(frozen=True)
class InferReply:
    """The answer to one request: its probabilities, or its error."""

    sequence: int
    probabilities_C: FloatArray | None
    error_code: int = 0
    error_message: str = ""
    retryable: bool = False
    server_ms: float = 0.0


def patch_name(file_name: str) -> str:
    """Return the name under which the patch of a student's file is fetched."""
    return f"{file_name}.patch"


def patch_file(file: StudentFile) -> StudentFile | None:
    """Return the file's patch as a file to fetch; None if there is no patch."""
    patch = file.patch
    return None if patch is None else StudentFile(patch_name(file.name), patch.size_bytes, patch.sha256)


def ratio_name(ratio: float) -> str:
    """Return a compression ratio as it is written in file names: 1 -> "1", 1.5 -> "1.5"."""
    return f"{ratio:g}"


def compressed_width(feature_width: int, ratio: float) -> int:
    """Return floor(feature_width / ratio), at least 1: the width of a compressed feature."""
    return max(1, int(feature_width / ratio))
