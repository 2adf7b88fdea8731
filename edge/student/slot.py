"""The versions of the student on this device: staged, verified, swapped in, rolled back.

    <root>/staging/<student id>/        manifest, signature and files as they arrive (``.part`` until complete);
                                        ``<file>.whole`` if a patch did not give the file, which is then fetched whole
    <root>/versions/<student id>/       verified students that have run
    <root>/current, <root>/previous     symbolic links into versions/, replaced by one rename
    <root>/trust.json                   keys, versions, refusals and trials of students (trust.py)

A student moves to ``versions`` only if the manifest's Ed25519 signature, every size, every SHA-256 and a trial run
agree, and if the manifest is fresh (trust.py). The student in ``current`` is never written to. A kill, a full disk or a
power loss at any point leaves ``current`` intact.
"""

import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from isthmus.data.files import link, make_folder, move, remove, sync, sync_tree, write_atomically
from isthmus.edge.student import trust
from isthmus.edge.student.kept import read_kept, unreadable, write_kept
from isthmus.edge.student.trust import Refusal, Refused, Times, Trial, Trust, Unfit
from isthmus.proto.convert import identifier, manifest_from_bytes, manifest_to_bytes
from isthmus.proto.errors import Corrupt, InvalidInput, IsthmusError, StorageFull, WrongState
from isthmus.proto.messages import Chunk, SignedManifest, StudentFile, StudentManifest, patch_file, patch_name
from isthmus.proto.patch import apply_patch

MANIFEST = "manifest.pb"
SIGNATURE = "manifest.sig"
SPARE_BYTES = 8 << 20
"""Left free on the disk after a download."""

_BLOCK_BYTES = 1 << 20

LoadTest = Callable[[Path, StudentManifest], None]
"""Runs the student in the folder once; raises an IsthmusError if it does not run."""


@dataclass(frozen=True)
class Installed:
    """A verified student: its folder and its manifest."""

    folder: Path
    manifest: StudentManifest


class StudentSlot:
    """The students in ``root``, used by one process at a time, in which several threads may share this object.

    ``public_key``: the 32 bytes pinned at enrolment. ``device_id``: students of other devices are refused, unless it is
    "". ``clock`` returns Unix time. Raises Corrupt if what is known of students cannot be read.
    """

    def __init__(
        self,
        root: Path,
        public_key: bytes,
        load_test: LoadTest,
        *,
        device_id: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._staging = root / "staging"
        self._versions = root / "versions"
        self._current = root / "current"
        self._previous = root / "previous"
        self._trust_file = root / "trust.json"
        self._load_test = load_test
        self._clock = clock
        self._bases: dict[bytes, Path] = {}
        self._begun: set[str] = set()
        self._changing = threading.RLock()
        with disk_errors():
            make_folder(self._staging)
            make_folder(self._versions)
        self._trust = trust.begun(_trust_in(self._trust_file), public_key, device_id)

    def begin(self, signed: SignedManifest, expected_id: str = "", *, again: bool = False) -> StudentManifest:
        """Open staging for a student; parts that an earlier try fetched for the same student are kept.

        ``again``: a student that was accepted before is fetched once more, because it is damaged. Files that an
        installed student has already (same SHA-256) are copied from it. If the base of a file's patch is installed and
        intact, the patch is fetched instead of the file. Raises Corrupt for a wrong signature, a wrong change of the
        key, or another student than ``expected_id``; Outdated and Refused as in trust.py; StorageFull if the disk has
        no room for the rest.
        """
        with self._changing:
            followed = trust.after_changes(self._trust, signed.key_changes, _is_signed)
            if not _is_signed(followed.keys[-1], signed.signature, signed.manifest_bytes):
                raise Corrupt(
                    "the student's signature does not match the key pinned at enrolment, or one that followed it. If "
                    "the cloud's operator lost the key, 'isthmus edge enrol --again' pins the new one"
                )
            manifest = manifest_from_bytes(signed.manifest_bytes)
            if expected_id and manifest.student_id != expected_id:
                raise Corrupt(f"the cloud sent student {manifest.student_id} for {expected_id}")
            self._remember(trust.accepted(followed, manifest, self._clock(), again=again))
        folder = self._staging / manifest.student_id
        with disk_errors():
            staged = folder / MANIFEST
            if staged.exists() and not _same_student(staged.read_bytes(), manifest):
                shutil.rmtree(folder)
            make_folder(folder)
            held = self._held()
            self._reuse_installed(folder, manifest, held)
            self._bases = _sound_bases(manifest, held)
            missing_bytes = sum(file.size_bytes - offset for file, offset in self.missing(manifest))
            # The patched file needs room too, beside the patch.
            wanted = {file.name for file, _ in self.missing(manifest)}
            missing_bytes += sum(file.size_bytes for file in manifest.files if patch_name(file.name) in wanted)
            if shutil.disk_usage(folder).free < missing_bytes + SPARE_BYTES:
                raise StorageFull(f"the disk cannot hold {missing_bytes} more bytes of student {manifest.student_id}")
            # Between the two the pair does not verify; then the student is described again.
            write_atomically(folder / SIGNATURE, signed.signature)
            write_atomically(staged, signed.manifest_bytes)
        return manifest

    def missing(self, manifest: StudentManifest) -> list[tuple[StudentFile, int]]:
        """Return the incomplete files, or their patches, each with the offset in bytes from which to go on."""
        folder = self._staging / manifest.student_id
        incomplete = []
        for file in manifest.files:
            if not (folder / file.name).is_file():
                wanted = self._cheapest(folder, file)
                part = _part(folder, wanted)
                offset = part.stat().st_size if part.is_file() else 0
                incomplete.append((wanted, offset if offset < wanted.size_bytes else 0))
        return incomplete

    def receive(self, manifest: StudentManifest, file: StudentFile, chunks: Iterable[Chunk]) -> int:
        """Append the chunks to the file (one of ``missing``) from its offset on; return the number of new bytes.

        A complete patch is applied at once. If it does not give the manifest's bytes, the whole file becomes
        ``missing``. A stream that ends early leaves the part for a later try. Raises Corrupt for a chunk that does not
        follow the last, for more bytes than the manifest says, and for a complete file with another hash (the part is
        then deleted); StorageFull; and what the chunks raise.
        """
        folder = self._staging / manifest.student_id
        part = _part(folder, file)
        (start,) = [offset for known, offset in self.missing(manifest) if known == file] or [file.size_bytes]
        position = start
        with disk_errors():
            with part.open("r+b" if start else "wb") as stream:
                stream.seek(start)
                for chunk in chunks:
                    if chunk.offset_bytes != position:
                        raise Corrupt(f"{file.name}: a chunk at {chunk.offset_bytes} came where {position} was due")
                    position += len(chunk.data)
                    if position > file.size_bytes:
                        raise Corrupt(f"{file.name}: more bytes than the manifest's {file.size_bytes}")
                    stream.write(chunk.data)
                stream.flush()
                os.fsync(stream.fileno())
            if position == file.size_bytes:
                patched = next((each for each in manifest.files if patch_name(each.name) == file.name), None)
                if patched is None:
                    self._accept(part, folder / file.name, file)
                else:
                    self._accept_patch(part, folder, file, patched)
        return position - start

    def verify(self, student_id: str) -> Installed:
        """Check the staged student's bytes on disk, run it, and move it to ``versions``.

        Safe to repeat. Raises Corrupt for a file that differs from the signed manifest (the file is deleted, so that
        it is fetched again), WrongState if files are missing, and what the trial raises.
        """
        folder = self._staging / identifier("student id", student_id)
        if folder.is_dir() and not self._is_complete(folder, student_id) and self.is_sound(student_id):
            _delete(folder)  # Left by a power loss; the student itself is here.
        if not folder.is_dir():
            installed = self.installed(student_id)
            self._check_files(installed)
            self._load_test(installed.folder, installed.manifest)
            return installed
        manifest = self._read_manifest(folder, student_id)
        if self.missing(manifest):
            raise WrongState(f"student {student_id} has not been fetched completely")
        for file in manifest.files:
            self._check_file(folder / file.name, file)
        try:
            self._load_test(folder, manifest)
        except InvalidInput as error:
            # These are the bytes that were signed: there is nothing to go on with.
            final = not isinstance(error, Unfit) or error.final
            self._remember(trust.refused(self._trust, manifest, str(error), final=final))
            shutil.rmtree(folder)
            raise
        target = self._versions / student_id
        with disk_errors():
            sync_tree(folder)
            if target.exists():
                # Fetched a second time: the old copy is deleted only after the new one is in its place.
                aside = self._staging / f".{student_id}.old"
                shutil.rmtree(aside, ignore_errors=True)
                move(target, aside)
            move(folder, target)
        return Installed(target, manifest)

    def refuse(self, student_id: str, reason: str) -> None:
        """Remember that an installed student is refused: its bytes are never fetched again. Raises as ``installed``."""
        manifest = self.installed(student_id).manifest
        self._remember(trust.refused(self._trust, manifest, reason))

    def check_newest(self, student_id: str) -> None:
        """Raise Outdated if an installed student is older than the newest that was accepted, Refused if it was refused.

        The cloud names the student that a job has made, and could name an old one that is still here.
        """
        manifest = self.installed(student_id).manifest
        reason = trust.refused_for(self._trust, trust.digest_of(manifest))
        if reason is not None:
            raise Refused(f"student {student_id} was refused before: {reason}")
        trust.check_version(self._trust, manifest)

    def started(self, student_id: str) -> None:
        """Count a use of a student on trial in this process, on the disk, before the student is loaded.

        Raises Refused if it has ended the process too often; it is then refused for good.
        """
        with self._changing:
            if student_id in self._begun:
                return
            after, usable = trust.started(self._trust, student_id)
            if not usable:
                reason = f"the device's process ended {trust.MOST_STARTS} times while this student was new"
                self._remember(trust.given_up(after, self.installed(student_id).manifest, reason))
                raise Refused(f"student {student_id} is given up: {reason}")
            self._remember(after)
            self._begun.add(student_id)

    def answered(self, student_id: str, cpu_ms: float) -> None:
        """Count an answer of a student and its time. Raises Refused if it is too slow; it is then refused for good."""
        with self._changing:
            before, (after, reason) = self._trust, trust.answered(self._trust, student_id, cpu_ms)
            if reason:
                self._remember(trust.given_up(after, self.installed(student_id).manifest, reason))
                raise Refused(f"student {student_id} is given up: {reason}")
            # The times of a good student need not outlive the process.
            if (after.good, after.trials) == (before.good, before.trials):
                self._trust = after
            else:
                self._remember(after)

    def finished(self, student_id: str) -> None:
        """Note that a use of a student has ended well."""
        with self._changing:
            self._begun.discard(student_id)
            self._remember(trust.ended(self._trust, student_id))

    def ended(self) -> None:
        """Note that the process ends properly."""
        for student_id in tuple(self._begun):
            self.finished(student_id)

    def trial_of(self, student_id: str) -> tuple[int, int] | None:
        """Return (clips answered, clips needed) of a student on trial; None for a good one."""
        if not student_id or student_id in self._trust.good:
            return None
        return next(
            (each.answered for each in self._trust.trials if each.student_id == student_id), 0
        ), trust.GOOD_AFTER

    def withdraw(self, student_id: str, substitutes: Iterable[str]) -> str:
        """Replace a refused student in use by the first sound one of ``previous`` and ``substitutes``; return its id.

        Returns "" if there is none: the student in use stays.
        """
        for name in (_target(self._previous), *substitutes):
            if not name or name == student_id or not self.is_sound(name):
                continue
            if trust.refused_for(self._trust, trust.digest_of(self.installed(name).manifest)) is not None:
                continue
            with disk_errors():
                self._point(self._current, name)
                remove(self._previous)
            return name
        return ""

    def installed(self, student_id: str) -> Installed:
        """Return a verified student. Raises WrongState if it is not here, Corrupt for a damaged manifest."""
        folder = self._versions / identifier("student id", student_id)
        if not folder.is_dir():
            raise WrongState(f"student {student_id} is not on this device")
        return Installed(folder, self._read_manifest(folder, student_id))

    def is_sound(self, student_id: str) -> bool:
        """Return whether the student is installed and every byte of it agrees with its signed manifest."""
        try:
            self.checked(student_id)
        except IsthmusError:
            return False
        return True

    def checked(self, student_id: str) -> Installed:
        """Return a verified student after hashing its files. Raises WrongState, and Corrupt for any damage."""
        installed = self.installed(student_id)
        self._check_files(installed)
        return installed

    def activate(self, student_id: str) -> Installed:
        """Make a verified student the current one; the one before becomes ``previous``. Safe to repeat."""
        installed = self.installed(student_id)
        before = _target(self._current)
        if before == student_id:
            return installed
        with disk_errors():
            if before is not None:
                self._point(self._previous, before)
            self._point(self._current, student_id)
        return installed

    def current(self) -> Installed | None:
        """Return the student in use, None if there is none. Raises Corrupt if its manifest no longer verifies."""
        name = _target(self._current)
        return None if name is None else self.installed(name)

    def rollback(self) -> Installed:
        """Exchange ``current`` and ``previous``. Raises WrongState without a previous student, Corrupt for damage."""
        before, now = _target(self._previous), _target(self._current)
        if before is None or now is None or before == now:
            raise WrongState("there is no previous student to go back to")
        installed = self.installed(before)
        self._check_files(installed)
        with disk_errors():
            self._point(self._current, before)
            self._point(self._previous, now)
        return installed

    def prune(self, keep: Iterable[str]) -> list[str]:
        """Delete all staging and every version except current, previous and ``keep``; return the deleted names."""
        kept = {*keep, _target(self._current), _target(self._previous)}
        gone = []
        for parent in (self._versions, self._staging):
            for folder in sorted(parent.iterdir()):
                if parent is self._staging or folder.name not in kept:
                    _delete(folder)
                    gone.append(folder.name)
        return gone

    def _remember(self, after: Trust) -> None:
        with self._changing, disk_errors():
            if after != self._trust:
                write_kept(self._trust_file, _to_json(after))
                self._trust = after

    def _point(self, name: Path, student_id: str) -> None:
        if name.is_dir() and not name.is_symlink():
            _delete(name)  # Not ours: a damaged state folder.
        link(name, Path("versions") / student_id)

    def _read_manifest(self, folder: Path, student_id: str) -> StudentManifest:
        try:
            signed = SignedManifest((folder / MANIFEST).read_bytes(), (folder / SIGNATURE).read_bytes())
        except FileNotFoundError as error:
            raise WrongState(f"student {student_id} has not been fetched completely") from error
        except OSError as error:
            raise Corrupt(f"student {student_id}: its manifest cannot be read") from error
        if not any(_is_signed(key, signed.signature, signed.manifest_bytes) for key in reversed(self._trust.keys)):
            raise Corrupt(f"student {student_id}: its signature does not match the key pinned at enrolment")
        manifest = manifest_from_bytes(signed.manifest_bytes)
        if manifest.student_id != student_id:
            raise Corrupt(f"the manifest in {student_id} belongs to {manifest.student_id}")
        return manifest

    def _is_complete(self, folder: Path, student_id: str) -> bool:
        try:
            return not self.missing(self._read_manifest(folder, student_id))
        except IsthmusError:
            return False

    def _cheapest(self, folder: Path, file: StudentFile) -> StudentFile:
        """Return the patch if this device can apply it and it has not failed before, else the file."""
        patch = patch_file(file)
        usable = file.patch is not None and file.patch.base_sha256 in self._bases
        return patch if patch is not None and usable and not _came_whole(folder, file).exists() else file

    def _held(self) -> dict[bytes, Path]:
        """Return the paths of the installed versions' files by SHA-256, from their manifests."""
        held: dict[bytes, Path] = {}
        for version in sorted(self._versions.iterdir()):
            try:
                known = self._read_manifest(version, version.name)
            except IsthmusError:
                continue  # A damaged version offers nothing; its use reports the damage.
            held.update({file.sha256: version / file.name for file in known.files})
        return held

    def _reuse_installed(self, folder: Path, manifest: StudentManifest, held: dict[bytes, Path]) -> None:
        """Copy unchanged files from installed versions, so that they are not downloaded again."""
        for file in manifest.files:
            source = held.get(file.sha256)
            if source is None or (folder / file.name).exists() or not source.is_file():
                continue
            part = _part(folder, file)
            shutil.copyfile(source, part)
            if part.stat().st_size == file.size_bytes and _sha256(part) == file.sha256:
                sync(part)
                move(part, folder / file.name)
            else:
                part.unlink()

    def _accept(self, part: Path, target: Path, file: StudentFile) -> None:
        if _sha256(part) != file.sha256:
            part.unlink()
            raise Corrupt(f"{file.name}: the hash does not match the manifest; it will be fetched again")
        move(part, target)

    def _accept_patch(self, part: Path, folder: Path, patch: StudentFile, file: StudentFile) -> None:
        if _sha256(part) != patch.sha256:
            part.unlink()
            raise Corrupt(f"{patch.name}: the hash does not match the manifest; it will be fetched again")
        assert file.patch is not None
        try:
            made = apply_patch(self._bases[file.patch.base_sha256].read_bytes(), part.read_bytes())
        except Corrupt:
            made = b""
        if hashlib.sha256(made).digest() == file.sha256:
            write_atomically(folder / file.name, made)
        else:
            _part(folder, file).unlink(missing_ok=True)
            write_atomically(_came_whole(folder, file), b"")
        part.unlink()

    def _check_files(self, installed: Installed) -> None:
        for file in installed.manifest.files:
            self._check_file(installed.folder / file.name, file, discard=False)

    def _check_file(self, path: Path, file: StudentFile, *, discard: bool = True) -> None:
        if path.is_file() and path.stat().st_size == file.size_bytes and _sha256(path) == file.sha256:
            return
        if discard:
            _delete(path)
        raise Corrupt(f"{file.name}: the bytes on disk do not match the signed manifest")


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn a full disk or quota, and one that can only be read, into StorageFull; a misplaced file into Corrupt."""
    try:
        yield
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise Corrupt(f"{error.filename}: {error.strerror}; move it away and run again") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFull("the disk is full; free some space and it goes on") from error
        if error.errno == errno.EROFS:  # a memory card that fails is often mounted anew like this
            raise StorageFull("the disk can only be read; make it writable and it goes on, or use another") from error
        raise


def _sound_bases(manifest: StudentManifest, held: dict[bytes, Path]) -> dict[bytes, Path]:
    """Return the intact installed files that are bases of the manifest's patches, by SHA-256."""
    wanted = {file.patch.base_sha256 for file in manifest.files if file.patch is not None}
    return {
        sha256: held[sha256]
        for sha256 in wanted & held.keys()
        if held[sha256].is_file() and _sha256(held[sha256]) == sha256
    }


def _came_whole(folder: Path, file: StudentFile) -> Path:
    return folder / f"{file.name}.whole"


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _part(folder: Path, file: StudentFile) -> Path:
    return folder / f"{file.name}.part"


def _sha256(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.digest()


def _target(link: Path) -> str | None:
    return Path(os.readlink(link)).name if link.is_symlink() else None


def _is_signed(key: bytes, signature: bytes, content: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, content)
    except (InvalidSignature, ValueError):
        return False
    return True


def _same_student(staged: bytes, manifest: StudentManifest) -> bool:
    """Return whether a staged manifest is the same but for its signing: then its parts are of use."""
    try:
        known = manifest_from_bytes(staged)
    except IsthmusError:
        return False
    # As bytes: a person model holds arrays, which do not compare by ==.
    one, other = (manifest_to_bytes(replace(each, version=0, expires_s=0, created_s=0)) for each in (known, manifest))
    return one == other


def _trust_in(path: Path) -> Trust | None:
    raw = read_kept(path)
    if raw is None:
        return None
    try:
        known = {each.name: raw[each.name] for each in fields(Trust)}
        base_digest, own_digest = map(str, raw["newest"])
        found = Trust(
            **{
                **known,
                "keys": tuple(bytes.fromhex(key) for key in raw["keys"]),
                "device_id": identifier("device id", raw["device_id"], optional=True),
                "accepted": tuple(map(str, raw["accepted"])),
                "newest": (base_digest, own_digest),
                "refusals": tuple(Refusal(**each) for each in raw["refusals"]),
                "good": tuple(map(str, raw["good"])),
                "trials": tuple(Trial(**each) for each in raw["trials"]),
                "times": tuple(Times(each["student_id"], tuple(map(float, each["cpu_ms"]))) for each in raw["times"]),
            }
        )
        counts = [
            found.base_version,
            found.own_version,
            *(n for each in found.trials for n in (each.answered, each.starts)),
        ]
        if not found.keys or any(len(key) != 32 for key in found.keys) or any(type(n) is not int for n in counts):
            raise ValueError("keys or counts")
        if not found.signed_s >= 0:
            raise ValueError("time")
    except (AttributeError, IsthmusError, KeyError, TypeError, ValueError) as error:
        raise unreadable(path) from error
    return found


def _to_json(known: Trust) -> dict[str, Any]:
    return {**asdict(known), "keys": [key.hex() for key in known.keys]}
