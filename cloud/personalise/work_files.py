"""The working files of jobs: a folder per job on the worker's machine and, if workers share a database, copies.

    <work>/<job id>.<fence>/    selection-<round>.npz, checkpoint.safetensors, heads.safetensors and what is beside it

The folder is named by the job's fence, so the folder of a worker that has lost its lease is another one. The worker
that takes the job on the same machine renames the folder, and goes on from the last epoch. On another machine the job
goes on from the copies, which are stored after each stage under ``work-<job id>`` in the artefacts. The job's row names
each copy's hash, in the transaction that ends the stage.
"""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from isthmus.cloud.store.artefacts import Artefacts
from isthmus.data.files import replaced
from isthmus.proto.errors import Corrupt, NotYours


@dataclass(frozen=True)
class WorkFiles:
    """Working files below ``root``. ``copies`` None: no other machine needs them."""

    root: Path
    copies: Artefacts | None = None

    def open(self, job_id: str, fence: int, kept: Mapping[str, str]) -> Path:
        """Return the folder of a job that was taken as number ``fence``, with the files that it had before.

        ``kept``: names and hashes of the copies. Raises Corrupt if a copy is gone or damaged.
        """
        folder = self._folder(job_id, fence)
        if folder.is_dir():
            return folder
        last = max(self._folders(job_id), key=_fence_of, default=None)
        # Without copies the newest folder is the job's. With them another machine may have gone further.
        if last is not None and (self.copies is None or _fence_of(last) == fence - 1):
            last.rename(folder)
        for stale in self._folders(job_id):
            if stale != folder:
                shutil.rmtree(stale, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        if self.copies is not None:
            try:
                for name in kept.keys() - {path.name for path in folder.iterdir()}:
                    sha256 = bytes.fromhex(kept[name])
                    with (
                        self.copies.on_disk(owner_of(job_id), name, folder, sha256) as copy,
                        replaced(folder / name) as part,
                    ):
                        shutil.copyfile(copy, part)
            except BaseException as error:
                shutil.rmtree(folder, ignore_errors=True)
                if isinstance(error, NotYours | Corrupt):
                    raise Corrupt("a working file of this personalisation is lost; start again") from error
                raise
        return folder

    def keep(self, job_id: str, fence: int, names: Iterable[str]) -> dict[str, str]:
        """Store copies of files. Returns their hashes by name; nothing if no other machine needs them."""
        if self.copies is None:
            return {}
        files = [self._folder(job_id, fence) / name for name in names]
        return {path.name: self.copies.put(owner_of(job_id), path.name, path).hex() for path in files if path.exists()}

    def discard(self, job_id: str) -> None:
        """Remove all working files of a job."""
        for folder in self._folders(job_id):
            shutil.rmtree(folder, ignore_errors=True)
        if self.copies is not None:
            self.copies.remove(owner_of(job_id))

    def job_ids(self) -> set[str]:
        """Return the jobs that have a folder on this machine."""
        return {path.name.partition(".")[0] for path in self.root.iterdir()} if self.root.is_dir() else set()

    def _folder(self, job_id: str, fence: int) -> Path:
        return self.root / f"{job_id}.{fence}"

    def _folders(self, job_id: str) -> list[Path]:
        # Version 0.1 named the folder by the job alone.
        return [path for path in (self.root / job_id, *self.root.glob(f"{job_id}.*")) if path.is_dir()]


def owner_of(job_id: str) -> str:
    """Return the owner of a job's copies in the artefacts."""
    return f"work-{job_id}"


def _fence_of(folder: Path) -> int:
    fence = folder.name.rpartition(".")[2]
    return int(fence) if fence.isdecimal() and "." in folder.name else 0
