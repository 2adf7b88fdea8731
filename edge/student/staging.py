"""Students as they arrive: one folder each, filled file by file, until all of it is here.

<root>/<student id>/    manifest, signature and files (``.part`` until complete); ``<file>.whole`` if a patch did not
                        give the file, which is then fetched whole
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from isthmus.data.files import make_folder, move, sync, write_atomically
from isthmus.edge.student.disk import delete, disk_errors, sha256_of
from isthmus.edge.student.signed import MANIFEST, SIGNATURE
from isthmus.proto.convert_student import manifest_from_bytes, manifest_to_bytes
from isthmus.proto.errors import Corrupt, IsthmusError, StorageFull
from isthmus.proto.messages import Chunk, SignedManifest, StudentFile, StudentManifest, patch_file, patch_name
from isthmus.proto.patch import apply_patch

SPARE_BYTES: Final = 8 << 20
"""Left free on the disk after a download."""


class Staging:
    """The folders of arriving students in ``root``. ``open`` comes before ``missing`` and ``receive``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._bases: dict[bytes, Path] = {}

    def folder(self, student_id: str) -> Path:
        return self._root / student_id

    def open(self, signed: SignedManifest, manifest: StudentManifest, held: Mapping[bytes, Path]) -> None:
        """Make the student's folder; parts that an earlier try fetched for the same student are kept.

        ``held``: installed files by SHA-256. Those that the student has too are copied instead of fetched. For a patch
        of one of them the patch is fetched. Raises StorageFull if the disk has no room for the rest, and as
        ``disk_errors``.
        """
        folder = self.folder(manifest.student_id)
        with disk_errors():
            staged = folder / MANIFEST
            if staged.exists() and not _same_student(staged.read_bytes(), manifest):
                shutil.rmtree(folder)
            make_folder(folder)
            _reuse_installed(folder, manifest, held)
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

    def missing(self, manifest: StudentManifest) -> list[tuple[StudentFile, int]]:
        """Return the incomplete files, or their patches, each with the offset in bytes from which to go on."""
        folder = self.folder(manifest.student_id)
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
        folder = self.folder(manifest.student_id)
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
                self._complete(part, folder, manifest, file)
        return position - start

    def clear(self) -> list[str]:
        """Delete every arriving student; return the names of their folders."""
        gone = sorted(self._root.iterdir())
        for folder in gone:
            delete(folder)
        return [folder.name for folder in gone]

    def _cheapest(self, folder: Path, file: StudentFile) -> StudentFile:
        """Return the patch if this device can apply it and it has not failed before, else the file."""
        patch = patch_file(file)
        usable = file.patch is not None and file.patch.base_sha256 in self._bases
        return patch if patch is not None and usable and not _came_whole(folder, file).exists() else file

    def _complete(self, part: Path, folder: Path, manifest: StudentManifest, file: StudentFile) -> None:
        """Put a complete file, or what a complete patch gives, in its place."""
        if sha256_of(part) != file.sha256:
            part.unlink()
            raise Corrupt(f"{file.name}: the hash does not match the manifest; it will be fetched again")
        patched = next((each for each in manifest.files if patch_name(each.name) == file.name), None)
        if patched is None:
            move(part, folder / file.name)
            return
        assert patched.patch is not None
        try:
            made = apply_patch(self._bases[patched.patch.base_sha256].read_bytes(), part.read_bytes())
        except Corrupt:
            made = b""
        if hashlib.sha256(made).digest() == patched.sha256:
            write_atomically(folder / patched.name, made)
        else:
            _part(folder, patched).unlink(missing_ok=True)
            write_atomically(_came_whole(folder, patched), b"")
        part.unlink()


def _reuse_installed(folder: Path, manifest: StudentManifest, held: Mapping[bytes, Path]) -> None:
    """Copy unchanged files from installed versions, so that they are not downloaded again."""
    for file in manifest.files:
        source = held.get(file.sha256)
        if source is None or (folder / file.name).exists() or not source.is_file():
            continue
        part = _part(folder, file)
        shutil.copyfile(source, part)
        if part.stat().st_size == file.size_bytes and sha256_of(part) == file.sha256:
            sync(part)
            move(part, folder / file.name)
        else:
            part.unlink()


def _sound_bases(manifest: StudentManifest, held: Mapping[bytes, Path]) -> dict[bytes, Path]:
    """Return the intact installed files that are bases of the manifest's patches, by SHA-256."""
    wanted = {file.patch.base_sha256 for file in manifest.files if file.patch is not None}
    return {
        sha256: held[sha256]
        for sha256 in wanted & held.keys()
        if held[sha256].is_file() and sha256_of(held[sha256]) == sha256
    }


def _came_whole(folder: Path, file: StudentFile) -> Path:
    return folder / f"{file.name}.whole"


def _part(folder: Path, file: StudentFile) -> Path:
    return folder / f"{file.name}.part"


def _same_student(staged: bytes, manifest: StudentManifest) -> bool:
    """Return whether a staged manifest is the same but for its signing: then its parts are of use."""
    try:
        known = manifest_from_bytes(staged)
    except IsthmusError:
        return False
    # As bytes: a person model holds arrays, which do not compare by ==.
    one, other = (manifest_to_bytes(replace(each, version=0, expires_s=0, created_s=0)) for each in (known, manifest))
    return one == other
