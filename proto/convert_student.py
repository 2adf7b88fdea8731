"""Conversion of students between messages.py and protobuf: manifests, their files and chunks, changes of the key.

The rules are those of convert.py.
"""

import math
import zlib
from dataclasses import asdict
from typing import Final

from google.protobuf.message import DecodeError

from isthmus.proto.checks import (
    MAX_TEXT_CHARS,
    bounded_text,
    check_finite,
    classes_of,
    feature_width_of,
    file_name,
    identifier,
)
from isthmus.proto.convert_person import centred_from_pb, centred_to_pb
from isthmus.proto.errors import Corrupt, InvalidInput, TooLarge
from isthmus.proto.limits import (
    CHUNK_BYTES,
    MAX_KEY_CHANGES,
    MAX_MESSAGE_BYTES,
    MAX_STUDENT_BYTES,
    MAX_STUDENT_FILE_BYTES,
    MAX_STUDENT_FILES,
)
from isthmus.proto.messages import (
    Chunk,
    KeyChange,
    PublicMeasure,
    SignedKeyChange,
    SignedManifest,
    StudentFile,
    StudentManifest,
    StudentPatch,
)
from isthmus.proto.v1 import isthmus_pb2 as pb

_ED25519_KEY_BYTES: Final = 32
_ED25519_SIGNATURE_BYTES: Final = 64
_SHA256_BYTES: Final = 32
_MAX_RATIOS: Final = 16
_KINDS: Final = ("base", "interim", "final")


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
        release=manifest.release,
    )


def student_manifest_from_pb(message: pb.StudentManifest) -> StudentManifest:
    """Return the manifest. Raises InvalidInput or TooLarge."""
    if len(message.files) > MAX_STUDENT_FILES or len(message.ratios) > _MAX_RATIOS:
        raise TooLarge("student: too many files or ratios")
    files = tuple(student_file_from_pb(file) for file in message.files)
    patches_bytes = sum(file.patch.size_bytes for file in files if file.patch is not None)
    if max(sum(file.size_bytes for file in files), patches_bytes) > MAX_STUDENT_BYTES:
        raise TooLarge(f"student: its files or its patches have over {MAX_STUDENT_BYTES} bytes in all")
    if not files or len({file.name for file in files}) != len(files):
        raise InvalidInput("student: no files, or a name twice")
    if message.kind not in _KINDS:
        raise InvalidInput("student: unknown kind; the other side is newer")
    check_finite("student", (message.created_s, message.expires_s, *message.ratios))
    if message.version < 0 or message.expires_s < 0:
        raise InvalidInput("student: a negative version or time of expiry")
    if any(ratio < 1 for ratio in message.ratios) or len(set(message.ratios)) != len(message.ratios):
        raise InvalidInput("student: a ratio under 1, or twice")
    return StudentManifest(
        student_id=identifier("student id", message.student_id),
        kind=message.kind,
        files=files,
        ratios=tuple(message.ratios),
        classes=classes_of(message.classes),
        input_spec_json=bounded_text("input spec", message.input_spec_json),
        feature_width=feature_width_of(message.feature_width),
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
        release=identifier("release", message.release, optional=True),
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
    if any(len(each) != _ED25519_SIGNATURE_BYTES for each in signatures) or len(message.change) > MAX_TEXT_CHARS:
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
    check_finite("student", (message.changed_s,))
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
