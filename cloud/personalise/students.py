"""Publish students with a signed manifest, describe them, and read their files in chunks. Without grpc.

A device sees its own students and the base student; nothing else exists for it.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sqlalchemy.exc import IntegrityError

from isthmus.cloud.offers.offer import Offer
from isthmus.cloud.offers.rollout import Record
from isthmus.cloud.personalise.signing import Signer
from isthmus.cloud.releases.catalogue import Offered, newest_version
from isthmus.cloud.store import releases, students
from isthmus.cloud.store.artefacts import Artefacts, valid_name
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.students import StudentRow
from isthmus.proto.convert_person import centred_from_bytes
from isthmus.proto.convert_student import manifest_from_bytes, manifest_to_bytes
from isthmus.proto.errors import Busy, Corrupt, Internal, InvalidInput, NotYours, TooLarge
from isthmus.proto.limits import CHUNK_BYTES
from isthmus.proto.messages import (
    Chunk,
    PublicMeasure,
    SignedManifest,
    StudentFile,
    StudentManifest,
    StudentPatch,
    patch_file,
    patch_name,
)
from isthmus.proto.patch import base_sha256
from isthmus.proto.person import Centred

log = logging.getLogger(__name__)

_MOST_REMEMBERED = 4_096

VALID_S = 30 * 86_400.0
"""A manifest is valid for this time. A device that is shown the same answers for longer refuses them."""

HEADS_FILE = "heads.safetensors"
"""Stored beside the device's files but in no manifest: the heads stay in the cloud."""

MEASURED_FILE = "measured.json"
"""Stored beside the heads: their results on public clips (PublicMeasure), which the manifest passes to the device."""

PERSON_FILE = "person.pb"
"""Stored beside the heads: the student's person model, which the manifest passes to the device. A release of few people
has none."""


@dataclass(frozen=True)
class Shelf:
    """The two stores that hold students: their rows and their files."""

    database: Database
    artefacts: Artefacts
    _sound: set[tuple[object, ...]] = field(default_factory=set, repr=False, compare=False)

    def check(self, student_id: str, name: str, sha256: bytes) -> None:
        """Check that a file is whole: once for as long as it is not written again.

        Raises Corrupt if its content is not that of ``sha256``, and NotYours if there is no such file.
        """
        key = (student_id, name, sha256, *self.artefacts.fingerprint(student_id, name, sha256))
        if key in self._sound:
            return
        if self.artefacts.sha256(student_id, name, sha256) != sha256:
            log.error("the file %s of student %s is damaged", name, student_id)
            raise Corrupt("the server's copy of this student is damaged; its operator must restore it from a backup")
        if len(self._sound) >= _MOST_REMEMBERED:
            self._sound.clear()
        self._sound.add(key)


def base_student_id(offer: Offer) -> str:
    """Return the id of the release's base student."""
    return f"base-{offer.release_hash[:16]}"


def publish(
    shelf: Shelf,
    signer: Signer,
    offer: Offer,
    *,
    student_id: str,
    device_id: str | None,
    kind: str,
    files: Sequence[Path],
    heads: Path | None,
    now_s: float,
) -> StudentManifest:
    """Store a student's files, then the row that makes them reachable. Safe to repeat.

    Raises StorageFull, Unavailable, and NotYours if the device was deleted meanwhile.

    ``files``: the files of the manifest, and patches named by ``patch_name``.
    """
    for path in (*files, *([heads] if heads is not None else [])):
        shelf.artefacts.put(student_id, path.name, path)
    database = shelf.database
    before = students.bases(database) if device_id is None else students.of_device(database, device_id)
    manifest = StudentManifest(
        student_id=student_id,
        kind=kind,
        files=_all_described(files),
        ratios=offer.ratios if heads is not None else (),
        classes=offer.classes,
        input_spec_json=offer.input_spec_json,
        feature_width=offer.feature_width,
        created_s=now_s,
        measured=_measured(heads),
        centred=_person_model(heads, offer),
        version=_next_version(before, now_s),
        expires_s=now_s + VALID_S,
        device_id=device_id or "",
        release=offer.release_hash,
    )
    signed = _signed(signer, manifest)
    sha256 = None if heads is None else _described(heads).sha256
    try:
        students.put(database, StudentRow(student_id, device_id, kind, signed, now_s, sha256, offer.release_hash))
    except (IntegrityError, NotYours) as error:
        if device_id is None:
            raise  # Another server publishes the same base student at this moment. These files are its files, too.
        shelf.artefacts.remove(student_id)
        raise NotYours("the device was deleted") from error
    return manifest


def publish_base(shelf: Shelf, signer: Signer, offer: Offer, folder: Path, now_s: float) -> str:
    """Publish the release's base student, unless it is published already. Returns its id. ``folder``: of its files.

    Raises InvalidInput if the release has no complete base student.
    """
    student_id = base_student_id(offer)
    heads = folder / HEADS_FILE
    files = sorted(folder.glob("*.onnx"))
    if not heads.is_file() or not files:
        raise InvalidInput("the release has no exported base student; run 'isthmus distill student' on it first")
    known = students.get(shelf.database, student_id)
    if known is None or known.heads_sha256 is None:
        try:
            publish(
                shelf,
                signer,
                offer,
                student_id=student_id,
                device_id=None,
                kind="base",
                files=files,
                heads=heads,
                now_s=now_s,
            )
            return student_id
        except IntegrityError:  # Another server was faster.
            known = students.get(shelf.database, student_id)
            if known is None:
                raise
    _mend(shelf, known, files, heads)
    return student_id


def _mend(shelf: Shelf, known: StudentRow, files: Sequence[Path], heads: Path) -> None:
    """Check the published base student. A damaged file is replaced by the release's, if that is sound.

    Raises InvalidInput if neither is.
    """
    released = {path.name: path for path in (*files, heads)}
    wanted = {file.name: file.sha256 for file in manifest_from_bytes(known.signed.manifest_bytes).files}
    wanted[HEADS_FILE] = known.heads_sha256 or b""
    for name, sha256 in wanted.items():
        path = released.get(name)
        sound = path is not None and _described(path).sha256 == sha256
        try:
            shelf.check(known.student_id, name, sha256)
        except (Corrupt, NotYours) as error:
            if path is None or not sound:
                raise InvalidInput(
                    f"{name} of the base student is damaged or gone, in the release and in the artefacts: restore one"
                ) from error
            log.warning("%s of the base student was damaged or gone; it is copied from the release again", name)
            shelf.artefacts.put(known.student_id, name, path)
        if not sound:
            log.error("%s of the release is not the one that was published; the published one is served", name)


def prune(shelf: Shelf, device_id: str, *, keep: int) -> None:
    """Remove all but a device's ``keep`` newest students, and its interim students but the newest ones.

    Interim students are counted apart: those of one personalisation never push out a student that a device may use.
    """
    rows = students.of_device(shelf.database, device_id)
    for of_kind in ([row for row in rows if row.kind != "interim"], [row for row in rows if row.kind == "interim"]):
        for row in of_kind[keep:]:
            students.remove(shelf.database, row.student_id)
            shelf.artefacts.remove(row.student_id)


def reachable(shelf: Shelf, device_id: str, student_id: str) -> StudentRow:
    """Return the student if it is the device's own or a base student. Raises NotYours."""
    # An id that names no artefact is not asked for: some databases refuse such text with an error of their own.
    row = students.get(shelf.database, student_id) if valid_name(student_id) else None
    if row is None or row.device_id not in (None, device_id):
        raise NotYours("no such student")
    return row


def described_row(shelf: Shelf, offered: Offered, device_id: str, student_id: str, *, base: bool) -> StudentRow:
    """Return the student that a device asks about. Raises NotYours.

    An empty id means the device's newest student or, if it has none, the base student of the release that the device is
    offered. ``base``: that base student in any case.
    """
    base_id = base_student_id(offered.offer)
    if base or student_id:
        return reachable(shelf, device_id, base_id if base else student_id)
    row = students.newest(shelf.database, device_id, base_id)
    if row is None:
        raise NotYours("no such student")
    return row


def describe(shelf: Shelf, signer: Signer, offered: Offered, row: StudentRow, now_s: float) -> SignedManifest:
    """Return the signed manifest of a student.

    A manifest is signed anew and stored if another key has signed it, if it has less than half of its time left, if it
    does not name its release, or if it is of the base student that is offered and a device may know a higher version.

    Raises NotYours if the student was removed meanwhile, and Busy if the offer was changed.
    """
    least = offered.least_version if row.student_id == base_student_id(offered.offer) else 1

    def sign(row: StudentRow, bases: Sequence[StudentRow], records: Sequence[Record]) -> SignedManifest:
        if least > 1 and all(each.serial != least for each in records):
            raise Busy("the release that this device is offered has just changed; try again", retry_after_s=0.1)
        if _is_current(signer, row, least, now_s):
            return row.signed  # Another call was faster.
        manifest = _manifest(row)
        version = manifest.version or int(row.created_s)  # 0: signed by version 0.1
        anew = replace(
            manifest,
            version=version if version >= least else max(least, _next_version(bases, now_s)),
            expires_s=now_s + VALID_S,
            device_id=row.device_id or "",
            release=row.release,
        )
        return _signed(signer, anew)

    if _is_current(signer, row, least, now_s):
        return row.signed
    if row.device_id is None:
        signed = releases.sign_base(shelf.database, row.student_id, sign)
        if signed is None:
            raise NotYours("no such student")
        return signed
    signed = sign(row, (), ())
    students.sign_anew(shelf.database, row.student_id, signed)
    return signed


def _is_current(signer: Signer, row: StudentRow, least_version: int, now_s: float) -> bool:
    manifest = _manifest(row)
    return (
        manifest.version >= least_version
        and manifest.release == row.release
        and manifest.expires_s - now_s > VALID_S / 2
        and signer.has_signed(row.signed.signature, row.signed.manifest_bytes)
    )


def check_fetch(shelf: Shelf, device_id: str, student_id: str, file_name: str, offset_bytes: int) -> StudentFile:
    """Return the manifest's entry of a file or patch that a device asks for.

    Raises NotYours for another device's student or a file outside the manifest, InvalidInput for an impossible offset,
    Corrupt if the file is damaged.
    """
    manifest = manifest_from_bytes(reachable(shelf, device_id, student_id).signed.manifest_bytes)
    offered = {file.name: file for file in manifest.files}
    offered |= {patch.name: patch for patch in map(patch_file, manifest.files) if patch is not None}
    file = offered.get(file_name)
    if file is None:
        raise NotYours("no such file in this student")
    if not 0 <= offset_bytes <= file.size_bytes:
        raise InvalidInput(f"offset: the file has {file.size_bytes} bytes")
    shelf.check(student_id, file_name, file.sha256)
    return file


def chunks(shelf: Shelf, student_id: str, file: StudentFile, offset_bytes: int) -> Iterator[Chunk]:
    """Yield the file from ``offset_bytes`` on. Blocking. Raises NotYours if it is gone, Internal if it is too short."""
    with shelf.artefacts.open(student_id, file.name, file.sha256) as reader:
        reader.seek(offset_bytes)
        while offset_bytes < file.size_bytes:
            data = reader.read(min(CHUNK_BYTES, file.size_bytes - offset_bytes))
            if not data:
                raise Internal(f"{student_id}/{file.name} ends at {offset_bytes} of {file.size_bytes} bytes")
            yield Chunk(offset_bytes, data, zlib.crc32(data))
            offset_bytes += len(data)


def _signed(signer: Signer, manifest: StudentManifest) -> SignedManifest:
    content = manifest_to_bytes(manifest)
    return SignedManifest(content, signer.sign(content))


def _manifest(row: StudentRow) -> StudentManifest:
    return manifest_from_bytes(row.signed.manifest_bytes)


def _next_version(rows: Sequence[StudentRow], now_s: float) -> int:
    """Return a version above those of ``rows``: all students of a device, or all base students.

    It is the Unix time if that is higher, so that it increases although the database was restored from a backup.
    """
    return max(int(now_s), 1 + newest_version(rows))


def _measured(heads: Path | None) -> PublicMeasure | None:
    path = None if heads is None else heads.with_name(MEASURED_FILE)
    return PublicMeasure(**json.loads(path.read_text())) if path is not None and path.is_file() else None


def _person_model(heads: Path | None, offer: Offer) -> Centred | None:
    path = None if heads is None else heads.with_name(PERSON_FILE)
    if path is None or not path.is_file():
        return None
    try:
        return centred_from_bytes(path.read_bytes(), len(offer.classes), offer.feature_width)
    except (InvalidInput, TooLarge) as error:
        raise InvalidInput(
            f"{path} is damaged ({error}): remove it, and students go on without a person model"
        ) from error


def _all_described(paths: Sequence[Path]) -> tuple[StudentFile, ...]:
    patches = {path.name: path for path in paths if path.suffix == ".patch"}
    described = []
    for path in sorted(set(paths) - set(patches.values())):
        file, patch = _described(path), patches.get(patch_name(path.name))
        if patch is not None:
            against = base_sha256(patch.read_bytes())
            as_file = _described(patch)
            file = replace(file, patch=StudentPatch(against, as_file.size_bytes, as_file.sha256))
        described.append(file)
    return tuple(described)


def _described(path: Path) -> StudentFile:
    with path.open("rb") as file:
        return StudentFile(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").digest())
