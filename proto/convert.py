"""Conversion between the dataclasses of messages.py and protobuf, in pairs: ``<x>_to_pb`` and ``<x>_from_pb``.

Every incoming message is untrusted. Each ``_from_pb`` checks the bounds (limits.py) before it allocates, then checks
the values. It raises an error of the tree (InvalidInput, BadPrototypes, TooLarge, Corrupt) whose message can be sent
back to the peer. codec.py converts features, convert_student.py students.

Axes: K prototypes, C classes.
"""

import math
from typing import Final

import numpy as np

from isthmus.proto.checks import MAX_TEXT_CHARS, bounded_text, check_finite, classes_of, feature_width_of, identifier
from isthmus.proto.errors import BadPrototypes, InvalidInput, TooLarge
from isthmus.proto.limits import (
    MAX_CLASSES,
    MAX_FEATURE_WIDTH,
    MAX_PROTOTYPE_ROWS,
    MAX_PROTOTYPE_VALUES,
    MAX_ROUNDS,
)
from isthmus.proto.messages import (
    Enrolment,
    FloatArray,
    InferReply,
    JobStatus,
    Prototypes,
    Stage,
    UploadMode,
)
from isthmus.proto.v1 import isthmus_pb2 as pb

ROW_SUM_TOLERANCE: Final = 1e-3
"""How far the sum of a distribution may be from 1."""

_ED25519_KEY_BYTES: Final = 32
_MAX_STAGES: Final = 32

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
    if not message.token or len(message.token) > MAX_TEXT_CHARS or not message.token.isascii():
        raise InvalidInput("enrolment: the token is missing or malformed")
    if len(message.signing_public_key) != _ED25519_KEY_BYTES:
        raise InvalidInput("enrolment: the signing key is not an Ed25519 public key")
    if not 0 <= message.rounds <= MAX_ROUNDS:
        raise InvalidInput(f"enrolment: {message.rounds} rounds")
    return Enrolment(
        device_id=identifier("device id", message.device_id),
        token=message.token,
        signing_public_key=message.signing_public_key,
        classes=classes_of(message.classes),
        input_spec_json=bounded_text("input spec", message.input_spec_json),
        feature_width=feature_width_of(message.feature_width),
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
        error=status.error[:MAX_TEXT_CHARS],
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
    check_finite("job", (message.progress, message.eta_s, *message.stage_seconds.values()))
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
        stage_seconds={bounded_text("stage", name): seconds for name, seconds in message.stage_seconds.items()},
        error=bounded_text("error", message.error),
        settled=message.settled,
    )


def infer_reply_to_pb(reply: InferReply) -> pb.InferResponse:
    if reply.probabilities_C is not None:
        probabilities = reply.probabilities_C.tolist()
        return pb.InferResponse(sequence=reply.sequence, server_ms=reply.server_ms, probabilities=probabilities)
    message = pb.InferResponse(sequence=reply.sequence, server_ms=reply.server_ms)
    message.error.code = reply.error_code
    message.error.message = reply.error_message[:MAX_TEXT_CHARS]
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
            error_message=bounded_text("error", error.message),
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
