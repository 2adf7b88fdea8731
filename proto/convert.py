"""Conversion between the dataclasses of messages.py and protobuf, in pairs: ``<x>_to_pb`` and ``<x>_from_pb``.

Every incoming message is untrusted. Each ``_from_pb`` checks the bounds (limits.py) before it allocates, then checks
the values. It raises an error of the tree (InvalidInput, BadPrototypes, TooLarge, Corrupt) whose message can be sent
back to the peer. codec.py converts features.

Axes: K prototypes, C classes.
"""

import math
import re
import zlib
from collections.abc import Iterable
from dataclasses import asdict
from typing import Final

import numpy as np
from google.protobuf.message import DecodeError

from isthmus.proto.convert_person import centred_from_pb, centred_to_pb
from isthmus.proto.errors import BadPrototypes, Corrupt, InvalidInput, TooLarge
from isthmus.proto.limits import (
    CHUNK_BYTES,
    MAX_CLASS_NAME_CHARS,
    MAX_CLASSES,
    MAX_FEATURE_WIDTH,
    MAX_KEY_CHANGES,
    MAX_MESSAGE_BYTES,
    MAX_NAME_CHARS,
    MAX_PROTOTYPE_ROWS,
    MAX_PROTOTYPE_VALUES,
    MAX_ROUNDS,
    MAX_STUDENT_BYTES,
    MAX_STUDENT_FILE_BYTES,
    MAX_STUDENT_FILES,
)
from isthmus.proto.messages import (
    Chunk,
    Enrolment,
    FloatArray,
    InferReply,
    JobStatus,
    KeyChange,
    Prototypes,
    PublicMeasure,
    SignedKeyChange,
    SignedManifest,
    Stage,
    StudentFile,
    StudentManifest,
    StudentPatch,
    UploadMode,
)
from isthmus.proto.v1 import isthmus_pb2 as pb

ROW_SUM_TOLERANCE: Final = 1e-3
"""How far the sum of a distribution may be from 1."""

_ED25519_KEY_BYTES: Final = 32
_ED25519_SIGNATURE_BYTES: Final = 64
_SHA256_BYTES: Final = 32
_MAX_TEXT_CHARS: Final = 4_096
_MAX_STAGES: Final = 32
_MAX_RATIOS: Final = 16
_IDENTIFIER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_FILE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.]*\.onnx")
_KINDS: Final = ("base", "interim", "final")

_MODE_TO_PB: Final = {
    UploadMode.PROTOTYPES: pb.Prototypes.MODE_PROTOTYPES,
    UploadMode.PROBABILITIES: pb.Prototypes.MODE_PROBABILITIES,
    UploadMode.FEATURES: pb.Prototypes.MODE_FEATURES,
}
_MODE_FROM_PB: Final = {number: mode for mode, number in _MODE_TO_PB.items()}
_STAGE_TO_PB: Final = {
    Stage.QUEUED: pb.JobStatus.STAGE_QUEUED,
    Stage.SELECTING: pb.JobStatus.STAGE_SELECTING,
    Stage.DISTILLING: pb.JobStatus.STAGE_DISTILLING,
    Stage.AWAITING_PROTOTYPES: pb.JobStatus.STAGE_AWAITING_PROTOTYPES,
    Stage.COMPRESSING: pb.JobStatus.STAGE_COMPRESSING,
    Stage.EXPORTING: pb.JobStatus.STAGE_EXPORTING,
    Stage.READY: pb.JobStatus.STAGE_READY,
    Stage.FAILED: pb.JobStatus.STAGE_FAILED,
}
_STAGE_FROM_PB: Final = {number: stage for stage, number in _STAGE_TO_PB.items()}


def identifier(field: str, text: str, *, optional: bool = False) -> str:
    """Return ``text`` if it is an id: at most 64 letters, digits, ``_ . -``, starting with a letter or digit.

    Ids become folder names and metadata, so anything else raises InvalidInput.
    """
    if (optional and not text) or (len(text) <= MAX_NAME_CHARS and _IDENTIFIER.fullmatch(text)):
        return text
    raise InvalidInput(f"{field}: not an id (letters, digits, '_', '.', '-', at most {MAX_NAME_CHARS})")


def file_name(text: str) -> str:
    """Return ``text`` if it is the name of a student's file: lower case, no folder, ``.onnx``. Raises InvalidInput."""
    if len(text) <= MAX_NAME_CHARS and _FILE_NAME.fullmatch(text):
        return text
    raise InvalidInput("file name: not the name of a student's file")


def prototypes_to_pb(prototypes: Prototypes) -> pb.Prototypes:
    rows, classes = prototypes.values_KC.shape
    features_KE = prototypes.features_KE
    return pb.Prototypes(
        values=np.ascontiguousarray(prototypes.values_KC, dtype="<f4").tobytes(),
        rows=rows,
        classes=classes,
        sizes=[int(size) for size in prototypes.sizes_K],
        mode=_MODE_TO_PB[prototypes.mode],
        min_cluster=prototypes.min_cluster,
        epsilon=prototypes.epsilon or 0.0,
        features=b"" if features_KE is None else np.ascontiguousarray(features_KE, dtype="<f4").tobytes(),
        feature_values=0 if features_KE is None else features_KE.shape[1],
    )


def prototypes_from_pb(message: pb.Prototypes) -> Prototypes:
    """Return the prototypes of an upload.

    Raises TooLarge over a bound. Raises BadPrototypes if a size is below the floor, a row is no distribution, mode
    FEATURES has no features or has noise, or another mode has features.
    """
    rows, classes, feature_values = message.rows, message.classes, message.feature_values
    if (
        rows > MAX_PROTOTYPE_ROWS
        or classes > MAX_CLASSES
        or feature_values > 2 * MAX_FEATURE_WIDTH
        or rows * (classes + feature_values) > MAX_PROTOTYPE_VALUES
    ):
        raise TooLarge(
            f"prototypes: {rows} x ({classes} + {feature_values}) is over the bound of {MAX_PROTOTYPE_VALUES} values"
        )
    if rows < 1 or classes < 2:
        raise BadPrototypes(f"prototypes: {rows} rows of {classes} classes; wanted at least 1 row of 2")
    if len(message.values) != rows * classes * 4:
        raise BadPrototypes(f"prototypes: {len(message.values)} bytes of values; {rows} x {classes} float32 are wanted")
    if len(message.sizes) != rows:
        raise BadPrototypes(f"prototypes: {len(message.sizes)} sizes for {rows} rows")
    mode = _MODE_FROM_PB.get(message.mode)
    if mode is None:
        raise BadPrototypes("prototypes: unknown upload mode")
    if message.min_cluster < 1:
        raise BadPrototypes(f"prototypes: min_cluster {message.min_cluster}; it is at least 1")
    sizes_K = np.array(message.sizes, dtype=np.int32)
    if mode is not UploadMode.PROBABILITIES and int(sizes_K.min()) < message.min_cluster:
        raise BadPrototypes(f"prototypes: one stands for fewer than {message.min_cluster} clips, the stated floor")
    if mode is UploadMode.PROBABILITIES and (sizes_K != 1).any():
        raise BadPrototypes("prototypes: in mode probabilities each row stands for 1 clip")
    if not math.isfinite(message.epsilon) or message.epsilon < 0:
        raise BadPrototypes("prototypes: epsilon is not a finite number, 0 or more")
    values_KC = np.frombuffer(message.values, dtype="<f4").reshape(rows, classes).astype(np.float32)
    if not np.isfinite(values_KC).all():
        raise BadPrototypes("prototypes: NaN or infinity")
    if (values_KC < 0).any() or (np.abs(values_KC.sum(axis=1, dtype=np.float64) - 1) > ROW_SUM_TOLERANCE).any():
        raise BadPrototypes("prototypes: a row is not a distribution (no negative values, sum 1)")
    features_KE = _features_from_pb(message, mode)
    return Prototypes(values_KC, sizes_K, mode, message.min_cluster, message.epsilon or None, features_KE)


def _features_from_pb(message: pb.Prototypes, mode: UploadMode) -> FloatArray | None:
    """Return the features of prototypes whose bounds and rows have been checked."""
    if mode is not UploadMode.FEATURES:
        if message.features or message.feature_values:
            raise BadPrototypes("prototypes: features come in mode features alone")
        return None
    width = message.feature_values
    if width < 2 or width % 2 or len(message.features) != message.rows * width * 4:
        raise BadPrototypes(
            f"prototypes: {len(message.features)} bytes of features; {message.rows} x {width} float32, both modalities "
            "of one width, are wanted"
        )
    if message.epsilon:
        raise BadPrototypes("prototypes: noise is promised for probabilities alone, not in mode features")
    features_KE = np.frombuffer(message.features, dtype="<f4").reshape(message.rows, width).astype(np.float32)
    if not np.isfinite(features_KE).all():
        raise BadPrototypes("prototypes: NaN or infinity in the features")
    return features_KE


def enrolment_to_pb(enrolment: Enrolment) -> pb.EnrolResponse:
    return pb.EnrolResponse(
        device_id=enrolment.device_id,
        token=enrolment.token,
        signing_public_key=enrolment.signing_public_key,
        classes=enrolment.classes,
        input_spec_json=enrolment.input_spec_json,
        feature_width=enrolment.feature_width,
        rounds=enrolment.rounds,
    )


def enrolment_from_pb(message: pb.EnrolResponse) -> Enrolment:
    """Return the enrolment. The input spec is bounded here and parsed later. Raises InvalidInput or TooLarge."""
    if not message.token or len(message.token) > _MAX_TEXT_CHARS or not message.token.isascii():
        raise InvalidInput("enrolment: the token is missing or malformed")
    if len(message.signing_public_key) != _ED25519_KEY_BYTES:
        raise InvalidInput("enrolment: the signing key is not an Ed25519 public key")
    if not 0 <= message.rounds <= MAX_ROUNDS:
        raise InvalidInput(f"enrolment: {message.rounds} rounds")
    return Enrolment(
        device_id=identifier("device id", message.device_id),
        token=message.token,
        signing_public_key=message.signing_public_key,
        classes=_classes(message.classes),
        input_spec_json=_text("input spec", message.input_spec_json),
        feature_width=_feature_width(message.feature_width),
        rounds=message.rounds,
    )


def job_status_to_pb(status: JobStatus) -> pb.JobStatus:
    return pb.JobStatus(
        job_id=status.job_id,
        stage=_STAGE_TO_PB[status.stage],
        round=status.round,
        rounds=status.rounds,
        epoch=status.epoch,
        epochs=status.epochs,
        progress=status.progress,
        eta_s=status.eta_s,
        student_id=status.student_id,
        selected_per_class=status.selected_per_class,
        stage_seconds=status.stage_seconds,
        error=status.error[:_MAX_TEXT_CHARS],
        settled=status.settled,
    )


def job_status_from_pb(message: pb.JobStatus) -> JobStatus:
    """Return the status. Raises InvalidInput or TooLarge."""
    stage = _STAGE_FROM_PB.get(message.stage)
    if stage is None:
        raise InvalidInput("job: unknown stage; the other side is newer")
    if len(message.selected_per_class) > MAX_CLASSES or len(message.stage_seconds) > _MAX_STAGES:
        raise TooLarge("job: too many entries")
    if not 0 <= message.round <= MAX_ROUNDS or not 0 <= message.rounds <= MAX_ROUNDS:
        raise InvalidInput(f"job: round {message.round} of {message.rounds}")
    if min(message.epoch, message.epochs, *message.selected_per_class) < 0:
        raise InvalidInput("job: a negative count")
    _finite("job", (message.progress, message.eta_s, *message.stage_seconds.values()))
    return JobStatus(
        job_id=identifier("job id", message.job_id),
        stage=stage,
        round=message.round,
        rounds=message.rounds,
        epoch=message.epoch,
        epochs=message.epochs,
        progress=message.progress,
        eta_s=message.eta_s,
        student_id=identifier("student id", message.student_id, optional=True),
        selected_per_class=tuple(message.selected_per_class),
        stage_seconds={_text("stage", name): seconds for name, seconds in message.stage_seconds.items()},
        error=_text("error", message.error),
        settled=message.settled,
    )


def student_file_to_pb(file: StudentFile) -> pb.StudentFile:
    message = pb.StudentFile(name=file.name, size_bytes=file.size_bytes, sha256=file.sha256)
    if file.patch is not None:
        message.patch.base_sha256 = file.patch.base_sha256
        message.patch.size_bytes = file.patch.size_bytes
        message.patch.sha256 = file.patch.sha256
    return message


def student_file_from_pb(message: pb.StudentFile) -> StudentFile:
    """Return the file. Raises InvalidInput for an impossible name or hash, TooLarge for a size over the bound."""
    _file_facts(message.size_bytes, message.sha256)
    patch = None
    if message.HasField("patch"):
        _file_facts(message.patch.size_bytes, message.patch.base_sha256, message.patch.sha256)
        patch = StudentPatch(message.patch.base_sha256, message.patch.size_bytes, message.patch.sha256)
    return StudentFile(file_name(message.name), message.size_bytes, message.sha256, patch)


def _file_facts(size_bytes: int, *hashes: bytes) -> None:
    if size_bytes > MAX_STUDENT_FILE_BYTES:
        raise TooLarge(f"student file: {size_bytes} bytes; at most {MAX_STUDENT_FILE_BYTES} are accepted")
    if size_bytes < 1:
        raise InvalidInput("student file: empty")
    if any(len(sha256) != _SHA256_BYTES for sha256 in hashes):
        raise InvalidInput("student file: the hash is not a SHA-256")


def public_measure_from_pb(message: pb.PublicMeasure, classes: int, ratios: int) -> PublicMeasure:
    """Return the measurement.

    Raises InvalidInput for no clips, an accuracy or threshold outside 0 to 1, shares that are no distribution over
    ``classes``, or accuracies that do not belong to ``ratios`` ratios.
    """
    if message.clips < 1 or not (0 <= message.accuracy <= 1 and 0 <= message.atc_threshold <= 1):
        raise InvalidInput("student: what was measured on public clips is out of bounds")
    shares = tuple(message.class_shares)
    if shares and (
        len(shares) != classes or not all(0 <= share <= 1 for share in shares) or abs(math.fsum(shares) - 1) > 1e-3
    ):
        raise InvalidInput("student: the shares of its classes are no distribution over them")
    by_ratio = tuple(message.ratio_accuracies)
    if by_ratio and (len(by_ratio) != ratios or not all(0 <= each <= 1 for each in by_ratio)):
        raise InvalidInput("student: the accuracies of its ratios are out of bounds, or of other ratios")
    return PublicMeasure(message.clips, message.accuracy, message.atc_threshold, shares, by_ratio)


def student_manifest_to_pb(manifest: StudentManifest) -> pb.StudentManifest:
    known = manifest.measured
    return pb.StudentManifest(
        student_id=manifest.student_id,
        kind=manifest.kind,
        files=[student_file_to_pb(file) for file in manifest.files],
        ratios=manifest.ratios,
        classes=manifest.classes,
        input_spec_json=manifest.input_spec_json,
        feature_width=manifest.feature_width,
        created_s=manifest.created_s,
        measured=None if known is None else pb.PublicMeasure(**asdict(known)),
        person=None if manifest.centred is None else centred_to_pb(manifest.centred),
        version=manifest.version,
        expires_s=manifest.expires_s,
        device_id=manifest.device_id,
    )


def student_manifest_from_pb(message: pb.StudentManifest) -> StudentManifest:
    """Return the manifest. Raises InvalidInput or TooLarge."""
    if len(message.files) > MAX_STUDENT_FILES or len(message.ratios) > _MAX_RATIOS:
        raise TooLarge("student: too many files or ratios")
    files = tuple(student_file_from_pb(file) for file in message.files)
    if sum(file.size_bytes for file in files) > MAX_STUDENT_BYTES:
        raise TooLarge(f"student: over {MAX_STUDENT_BYTES} bytes in all")
    if not files or len({file.name for file in files}) != len(files):
        raise InvalidInput("student: no files, or a name twice")
    if message.kind not in _KINDS:
        raise InvalidInput("student: unknown kind; the other side is newer")
    _finite("student", (message.created_s, message.expires_s, *message.ratios))
    if message.version < 0 or message.expires_s < 0:
        raise InvalidInput("student: a negative version or time of expiry")
    if any(ratio < 1 for ratio in message.ratios) or len(set(message.ratios)) != len(message.ratios):
        raise InvalidInput("student: a ratio under 1, or twice")
    return StudentManifest(
        student_id=identifier("student id", message.student_id),
        kind=message.kind,
        files=files,
        ratios=tuple(message.ratios),
        classes=_classes(message.classes),
        input_spec_json=_text("input spec", message.input_spec_json),
        feature_width=_feature_width(message.feature_width),
        created_s=message.created_s,
        measured=public_measure_from_pb(message.measured, len(message.classes), len(message.ratios))
        if message.HasField("measured")
        else None,
        centred=centred_from_pb(message.person, len(message.classes), message.feature_width)
        if message.HasField("person")
        else None,
        version=message.version,
        expires_s=message.expires_s,
        device_id=identifier("device id", message.device_id, optional=True),
    )


def manifest_to_bytes(manifest: StudentManifest) -> bytes:
    """Return the bytes that are signed and sent."""
    manifest_bytes: bytes = student_manifest_to_pb(manifest).SerializeToString(deterministic=True)
    return manifest_bytes


def manifest_from_bytes(manifest_bytes: bytes) -> StudentManifest:
    """Parse bytes whose signature has been verified. Raises InvalidInput or TooLarge."""
    if len(manifest_bytes) > MAX_MESSAGE_BYTES:
        raise TooLarge("student: the manifest is larger than a message")
    message = pb.StudentManifest()
    try:
        message.ParseFromString(manifest_bytes)
    except DecodeError as error:
        raise InvalidInput("student: the manifest does not parse") from error
    return student_manifest_from_pb(message)


def signed_manifest_to_pb(signed: SignedManifest) -> pb.DescribeStudentResponse:
    return pb.DescribeStudentResponse(
        manifest=signed.manifest_bytes,
        signature=signed.signature,
        key_changes=[signed_key_change_to_pb(each) for each in signed.key_changes],
    )


def signed_manifest_from_pb(message: pb.DescribeStudentResponse) -> SignedManifest:
    """Return the manifest with its signature, which the receiver must verify.

    Raises Corrupt for a signature of a wrong length, TooLarge for too many changes of the key.
    """
    if len(message.signature) != _ED25519_SIGNATURE_BYTES or not message.manifest:
        raise Corrupt("student: the manifest is not signed")
    if len(message.key_changes) > MAX_KEY_CHANGES:
        raise TooLarge(
            f"student: {len(message.key_changes)} changes of the key; at most {MAX_KEY_CHANGES} are accepted"
        )
    changes = tuple(signed_key_change_from_pb(each) for each in message.key_changes)
    return SignedManifest(message.manifest, message.signature, changes)


def signed_key_change_to_pb(signed: SignedKeyChange) -> pb.SignedKeyChange:
    return pb.SignedKeyChange(
        change=signed.change_bytes,
        previous_signature=signed.previous_signature,
        next_signature=signed.next_signature,
    )


def signed_key_change_from_pb(message: pb.SignedKeyChange) -> SignedKeyChange:
    """Return the change, which the receiver must verify. Raises Corrupt for signatures of a wrong length."""
    signatures = (message.previous_signature, message.next_signature)
    if any(len(each) != _ED25519_SIGNATURE_BYTES for each in signatures) or len(message.change) > _MAX_TEXT_CHARS:
        raise Corrupt("student: a change of the key is not signed")
    return SignedKeyChange(message.change, *signatures)


def key_change_to_bytes(change: KeyChange) -> bytes:
    """Return the bytes that are signed after ``KEY_CHANGE_CONTEXT``."""
    message = pb.KeyChange(previous_key=change.previous_key, next_key=change.next_key, changed_s=change.changed_s)
    change_bytes: bytes = message.SerializeToString(deterministic=True)
    return change_bytes


def key_change_from_bytes(change_bytes: bytes) -> KeyChange:
    """Parse a change. Raises InvalidInput."""
    try:
        message = pb.KeyChange.FromString(change_bytes)
    except DecodeError as error:
        raise InvalidInput("student: a change of the key does not parse") from error
    if len(message.previous_key) != _ED25519_KEY_BYTES or len(message.next_key) != _ED25519_KEY_BYTES:
        raise InvalidInput("student: a change of the key names no Ed25519 keys")
    _finite("student", (message.changed_s,))
    return KeyChange(message.previous_key, message.next_key, message.changed_s)


def chunk_to_pb(chunk: Chunk) -> pb.FetchStudentResponse:
    return pb.FetchStudentResponse(offset_bytes=chunk.offset_bytes, data=chunk.data, crc32=chunk.crc32)


def chunk_from_pb(message: pb.FetchStudentResponse) -> Chunk:
    """Return the chunk. Raises TooLarge, InvalidInput for an impossible chunk, Corrupt for a wrong CRC-32."""
    if len(message.data) > CHUNK_BYTES:
        raise TooLarge(f"chunk: {len(message.data)} bytes; at most {CHUNK_BYTES} are accepted")
    if not message.data or not 0 <= message.offset_bytes < MAX_STUDENT_FILE_BYTES:
        raise InvalidInput("chunk: empty, or at an impossible offset")
    if zlib.crc32(message.data) != message.crc32:
        raise Corrupt(f"chunk: the checksum at {message.offset_bytes} does not match; fetch it again")
    return Chunk(message.offset_bytes, message.data, message.crc32)


def infer_reply_to_pb(reply: InferReply) -> pb.InferResponse:
    message = pb.InferResponse(sequence=reply.sequence, server_ms=reply.server_ms)
    if reply.probabilities_C is not None:
        message.probabilities.extend(float(value) for value in reply.probabilities_C)
    else:
        message.error.code = reply.error_code
        message.error.message = reply.error_message[:_MAX_TEXT_CHARS]
        message.error.retryable = reply.retryable
    return message


def infer_reply_from_pb(message: pb.InferResponse) -> InferReply:
    """Return the answer. Raises InvalidInput for probabilities that are no distribution, TooLarge for too many."""
    if message.HasField("error"):
        error = message.error
        return InferReply(
            sequence=message.sequence,
            probabilities_C=None,
            error_code=error.code,
            error_message=_text("error", error.message),
            retryable=error.retryable,
            server_ms=message.server_ms,
        )
    if len(message.probabilities) > MAX_CLASSES:
        raise TooLarge(f"answer: {len(message.probabilities)} classes; at most {MAX_CLASSES} are accepted")
    probabilities_C = np.array(message.probabilities, dtype=np.float32)
    if (
        len(probabilities_C) < 2
        or not np.isfinite(probabilities_C).all()
        or (probabilities_C < 0).any()
        or abs(float(probabilities_C.sum(dtype=np.float64)) - 1) > ROW_SUM_TOLERANCE
    ):
        raise InvalidInput("answer: the probabilities are not a distribution")
    return InferReply(sequence=message.sequence, probabilities_C=probabilities_C, server_ms=message.server_ms)


def _classes(names: Iterable[str]) -> tuple[str, ...]:
    classes = tuple(names)
    if len(classes) > MAX_CLASSES or any(len(name) > MAX_CLASS_NAME_CHARS for name in classes):
        raise TooLarge("classes: too many, or a name too long")
    if len(classes) < 2 or len(set(classes)) != len(classes) or not all(classes):
        raise InvalidInput("classes: at least two different names are wanted")
    return classes


def _feature_width(width: int) -> int:
    if width > MAX_FEATURE_WIDTH:
        raise TooLarge(f"feature width {width}; at most {MAX_FEATURE_WIDTH} is accepted")
    if width < 1:
        raise InvalidInput(f"feature width {width}")
    return width


def _text(field: str, text: str) -> str:
    if len(text) > _MAX_TEXT_CHARS:
        raise TooLarge(f"{field}: longer than {_MAX_TEXT_CHARS} characters")
    return text


def _finite(subject: str, numbers: Iterable[float]) -> None:
    if not all(math.isfinite(number) for number in numbers):
        raise InvalidInput(f"{subject}: a number is not finite")
