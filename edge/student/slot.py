"""The versions of the student on this device: staged, verified, swapped in, rolled back.

    <root>/staging/<student id>/        students as they arrive (staging.py)
    <root>/versions/<student id>/       verified students that have run
    <root>/current, <root>/previous     symbolic links into versions/, replaced by one rename
    <root>/trust.json                   keys, versions, refusals and trials of students (trust.py)

A student moves to ``versions`` only if the manifest's Ed25519 signature, every size, every SHA-256 and a trial run
agree, and if the manifest is fresh (trust.py). The student in ``current`` is never written to. A kill, a full disk or a
power loss at any point leaves ``current`` intact.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from isthmus.data.files import link, make_folder, move, remove, sync_tree
from isthmus.edge.student import trust
from isthmus.edge.student.disk import delete, disk_errors
from isthmus.edge.student.signed import Installed, check_file, check_files, is_signed, read_manifest
from isthmus.edge.student.staging import Staging
from isthmus.edge.student.trust import Refused, Trust, Unfit
from isthmus.edge.student.trust_file import read_trust, write_trust
from isthmus.proto.checks import identifier
from isthmus.proto.convert_student import manifest_from_bytes
from isthmus.proto.errors import Corrupt, InvalidInput, IsthmusError, WrongState
from isthmus.proto.messages import Chunk, SignedManifest, StudentFile, StudentManifest

LoadTest = Callable[[Path, StudentManifest], None]
"""Runs the student in the folder once; raises an IsthmusError if it does not run."""


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
        self._arriving = root / "staging"
        self._staging = Staging(self._arriving)
        self._versions = root / "versions"
        self._current = root / "current"
        self._previous = root / "previous"
        self._trust_file = root / "trust.json"
        self._load_test = load_test
        self._clock = clock
        self._begun: set[str] = set()
        self._changing = threading.RLock()
        with disk_errors():
            make_folder(self._arriving)
            make_folder(self._versions)
        self._trust = trust.begun(read_trust(self._trust_file), public_key, device_id)

    def begin(self, signed: SignedManifest, expected_id: str = "", *, again: bool = False) -> StudentManifest:
        """Open staging for a student; parts that an earlier try fetched for the same student are kept.

        ``again``: a student that was accepted before is fetched once more, because it is damaged. Files that an
        installed student has already (same SHA-256) are copied from it. If the base of a file's patch is installed and
        intact, the patch is fetched instead of the file. Raises Corrupt for a wrong signature, a wrong change of the
        key, or another student than ``expected_id``; Outdated and Refused as in trust.py; StorageFull if the disk has
        no room for the rest.
        """
        with self._changing:
            followed, manifest = self._verified(signed)
            if expected_id and manifest.student_id != expected_id:
                raise Corrupt(f"the cloud sent student {manifest.student_id} for {expected_id}")
            self._remember(trust.accepted(followed, manifest, self._clock(), again=again))
        self._staging.open(signed, manifest, self._held())
        return manifest

    def offered_release(self, signed: SignedManifest) -> str:
        """Return the release of the base student that the cloud offers; "" if the cloud does not say.

        The manifest is accepted as if the student were to be fetched, so an older offer cannot be replayed. Raises
        Corrupt, Outdated and Refused as ``begin`` does.
        """
        with self._changing:
            followed, manifest = self._verified(signed)
            if manifest.kind != "base" or not manifest.release:
                return ""
            self._remember(trust.accepted(followed, manifest, self._clock()))
            return manifest.release

    def signed_release(self, signed: SignedManifest, student_id: str) -> str:
        """Return the release of an installed student by a manifest that was signed since. Raises Corrupt."""
        _, manifest = self._verified(signed)
        if manifest.student_id != student_id:
            raise Corrupt(f"the cloud described student {manifest.student_id} for {student_id}")
        return manifest.release

    def previous_id(self) -> str:
        """Return the id of the student to which ``rollback`` would go; "" if there is none."""
        before = _target(self._previous)
        return before if before is not None and before != _target(self._current) else ""

    def missing(self, manifest: StudentManifest) -> list[tuple[StudentFile, int]]:
        """Return the incomplete files, or their patches, each with the offset in bytes from which to go on."""
        return self._staging.missing(manifest)

    def receive(self, manifest: StudentManifest, file: StudentFile, chunks: Iterable[Chunk]) -> int:
        """Append the chunks to the file (one of ``missing``); return the number of new bytes. See Staging.receive."""
        return self._staging.receive(manifest, file, chunks)

    def verify(self, student_id: str) -> Installed:
        """Check the staged student's bytes on disk, run it, and move it to ``versions``.

        Safe to repeat. Raises Corrupt for a file that differs from the signed manifest (the file is deleted, so that
        it is fetched again), WrongState if files are missing, and what the trial raises.
        """
        folder = self._staging.folder(identifier("student id", student_id))
        if folder.is_dir() and not self._is_complete(folder, student_id) and self.is_sound(student_id):
            delete(folder)  # Left by a power loss; the student itself is here.
        if not folder.is_dir():
            installed = self.installed(student_id)
            check_files(installed)
            self._load_test(installed.folder, installed.manifest)
            return installed
        manifest = read_manifest(folder, student_id, self._trust.keys)
        if self.missing(manifest):
            raise WrongState(f"student {student_id} has not been fetched completely")
        for file in manifest.files:
            try:
                check_file(folder / file.name, file)
            except Corrupt:
                delete(folder / file.name)
                raise
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
                aside = self._arriving / f".{student_id}.old"
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
        return Installed(folder, read_manifest(folder, student_id, self._trust.keys))

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
        check_files(installed)
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
        check_files(installed)
        with disk_errors():
            self._point(self._current, before)
            self._point(self._previous, now)
        return installed

    def prune(self, keep: Iterable[str]) -> list[str]:
        """Delete all staging and every version except current, previous and ``keep``; return the deleted names."""
        kept = {*keep, _target(self._current), _target(self._previous)}
        gone = [folder for folder in sorted(self._versions.iterdir()) if folder.name not in kept]
        for folder in gone:
            delete(folder)
        return [*(folder.name for folder in gone), *self._staging.clear()]

    def _verified(self, signed: SignedManifest) -> tuple[Trust, StudentManifest]:
        """Return the trust after the changes of the key, and the manifest, whose signature is verified."""
        followed = trust.after_changes(self._trust, signed.key_changes, is_signed)
        if not is_signed(followed.keys[-1], signed.signature, signed.manifest_bytes):
            raise Corrupt(
                "the student's signature does not match the key pinned at enrolment, or one that followed it. If "
                "the cloud's operator lost the key, 'isthmus edge enrol --again' pins the new one"
            )
        return followed, manifest_from_bytes(signed.manifest_bytes)

    def _remember(self, after: Trust) -> None:
        with self._changing, disk_errors():
            if after != self._trust:
                write_trust(self._trust_file, after)
                self._trust = after

    def _point(self, name: Path, student_id: str) -> None:
        if name.is_dir() and not name.is_symlink():
            delete(name)  # Not ours: a damaged state folder.
        link(name, Path("versions") / student_id)

    def _is_complete(self, folder: Path, student_id: str) -> bool:
        try:
            return not self.missing(read_manifest(folder, student_id, self._trust.keys))
        except IsthmusError:
            return False

    def _held(self) -> dict[bytes, Path]:
        """Return the paths of the installed versions' files by SHA-256, from their manifests."""
        held: dict[bytes, Path] = {}
        for version in sorted(self._versions.iterdir()):
            try:
                known = read_manifest(version, version.name, self._trust.keys)
            except IsthmusError:
                continue  # A damaged version offers nothing; its use reports the damage.
            held.update({file.sha256: version / file.name for file in known.files})
        return held


def _target(link: Path) -> str | None:
    return Path(os.readlink(link)).name if link.is_symlink() else None
