"""Backup and restore of a server: database, students, signing key, unfinished jobs.

A backup is one tar file. It is taken while the server runs: the database first, as one snapshot; then the files, each
of which is whole at any moment. Files that changed meanwhile are newer than the snapshot, as after a crash, which is
what the service is made to resume from.

    database.sqlite     all tables, whichever database the server uses
    artefacts/ID/NAME   students, weights of tasks, published releases, copies of unfinished jobs' files
    work/JOB/NAME       files of unfinished jobs
    state/NAME          the signing key and the other files of the state folder
    manifest.json       SHA-256 and size of each of them; the last member
"""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

import sqlalchemy as sa

from isthmus.cloud.personalise.work_files import owner_of
from isthmus.cloud.releases.files import owner_of as release_owner
from isthmus.cloud.store.artefacts import Artefacts, valid_stored_name
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.schema import metadata
from isthmus.proto.errors import Corrupt, InvalidInput, NotYours

_DATABASE: Final = "database.sqlite"
_MANIFEST: Final = "manifest.json"
_MEMBER: Final = re.compile(r"(artefacts|work)/[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*|state/[A-Za-z0-9][\w.-]*")
_NOT_KEPT: Final = re.compile(r"isthmus\.db.*|.*\.lock|.*\.part|port|worker\.job")
_FORMAT: Final = 1
_ENDED: Final = ("ready", "failed")
_NEED_FILES: Final = ("distilling", "compressing", "exporting")


def backup(database: Database, artefacts: Artefacts, state: Path, target: Path) -> int:
    """Write a backup to the file ``target`` (mode 0600, since it holds the signing key). Returns its size in bytes.

    The server may be running. ``target`` appears whole or not at all. Raises InvalidInput if it exists.
    """
    if target.exists():
        raise InvalidInput(f"{target} exists already; name another file")
    part = target.with_name(f"{target.name}.part")
    described: dict[str, dict[str, object]] = {}
    with _private(part) as file, tarfile.open(fileobj=file, mode="w") as tar, tempfile.TemporaryDirectory() as folder:
        snapshot = Path(folder) / _DATABASE
        copy = _empty_copy(snapshot)
        with database.reading() as source:
            _snapshot(source)
            _copy_rows(source, copy)
        for artefact_id in _artefact_ids(copy):
            for name in artefacts.names(artefact_id):
                # A student that is pruned meanwhile is missing here, and its row is dropped below.
                with suppress(NotYours), artefacts.open(artefact_id, name) as reader:
                    _add(tar, f"artefacts/{artefact_id}/{name}", reader, described)
        _drop_without_files(copy, {key.split("/")[1] for key in described})
        for job_id in _open_jobs(copy):
            # The folder is named by the job and the number of its takes, see work_files.py; the last one counts.
            folders = sorted((state / "work").glob(f"{job_id}*"), key=lambda found: found.stat().st_mtime)
            for work in folders[-1:]:
                for path in sorted(work.glob("*")):
                    _add_file(tar, f"work/{job_id}/{path.name}", path, described)
        for path in sorted(state.iterdir()):
            if path.is_file() and not _NOT_KEPT.fullmatch(path.name):
                _add_file(tar, f"state/{path.name}", path, described)
        copy.close()
        _add_file(tar, _DATABASE, snapshot, described)
        content = json.dumps({"format": _FORMAT, "files": described}).encode()
        _add(tar, _MANIFEST, io.BytesIO(content), {})
    os.replace(part, target)
    return target.stat().st_size


def restore(source: Path, database_url: str, artefacts_url: str | None, state: Path) -> None:
    """Make state folder, database and artefacts of a backup. Nothing that exists is overwritten.

    ``artefacts_url`` None: a folder in ``state``. Raises InvalidInput if ``state`` or the database is in use already,
    or if the backup is damaged; then nothing was changed.
    """
    if state.exists() and any(state.iterdir()):
        raise InvalidInput(f"{state} is not empty; move it away, or restore to another folder")
    staged = state.with_name(f"{state.name}.restoring")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True, mode=0o700)
    try:
        _unpack(source, staged)
        copy = Database(f"sqlite:///{(staged / _DATABASE).absolute()}")
        copy.migrate()
        artefacts = staged / "artefacts"
        embedded = database_url == f"sqlite:///{state.absolute() / 'isthmus.db'}"
        _begin_again(copy, Artefacts(str(artefacts)), staged / "work", shared=not embedded)
        if embedded:
            copy.close()
            os.replace(staged / _DATABASE, staged / "isthmus.db")
        if artefacts_url is not None:
            _upload(artefacts, Artefacts(artefacts_url))
            shutil.rmtree(artefacts, ignore_errors=True)
        if not embedded:
            _fill(Database(database_url), copy)
            copy.close()
            (staged / _DATABASE).unlink()
        for leftover in staged.glob(f"{_DATABASE}*"):
            leftover.unlink()
        if state.exists():
            state.rmdir()
        os.replace(staged, state)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def _private(part: Path) -> Iterator[IO[bytes]]:
    """A new file that only its owner may read, on disk when the block ends; removed if the block raises."""
    part.unlink(missing_ok=True)
    file = os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _empty_copy(path: Path) -> Database:
    copy = Database(f"sqlite:///{path}")
    copy.migrate()
    return copy


def _snapshot(connection: sa.Connection) -> None:
    """Let a reading transaction see one state of a PostgreSQL database; SQLite's always does."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")


def _copy_rows(source: sa.Connection, target: Database) -> None:
    with target.writing() as connection:
        for table in metadata.sorted_tables:
            rows = [dict(row._mapping) for row in source.execute(sa.select(table))]
            connection.execute(table.delete())
            if rows:
                connection.execute(table.insert(), rows)


def _artefact_ids(copy: Database) -> list[str]:
    students, tasks, releases = (metadata.tables[name] for name in ("students", "tasks", "releases"))
    with copy.reading() as connection:
        owners = {*connection.scalars(sa.select(students.c.id)), *connection.scalars(sa.select(tasks.c.artefact_id))}
        owners |= {
            release_owner(each) for each in connection.scalars(sa.select(releases.c.id).where(releases.c.stored))
        }
    return sorted(owners | {owner_of(job_id) for job_id in _open_jobs(copy)})


def _drop_without_files(copy: Database, kept: set[str]) -> None:
    students, tasks = metadata.tables["students"], metadata.tables["tasks"]
    with copy.writing() as connection:
        connection.execute(students.delete().where(students.c.id.not_in(kept)))
        connection.execute(tasks.delete().where(tasks.c.artefact_id.not_in(kept)))


def _open_jobs(copy: Database) -> list[str]:
    jobs = metadata.tables["jobs"]
    with copy.reading() as connection:
        return sorted(connection.scalars(sa.select(jobs.c.id).where(jobs.c.stage.not_in(_ENDED))))


def _begin_again(copy: Database, artefacts: Artefacts, work: Path, *, shared: bool) -> None:
    """Free unfinished jobs, and give each its working files. Jobs whose files are gone select their clips again.

    ``shared``: workers on other machines need copies of the files in the artefacts.
    """
    jobs = metadata.tables["jobs"]
    with copy.writing() as connection:
        for row in connection.execute(sa.select(jobs).where(jobs.c.stage.not_in(_ENDED))).all():
            folder, owner = work / row.id, owner_of(row.id)
            if not folder.is_dir() and row.work_files:
                _fetch(artefacts, owner, row.work_files, folder)
            values: dict[str, object] = {"worker": "", "lease_until_s": 0.0, "fence": 0, "work_files": {}}
            if not folder.is_dir() and row.stage in _NEED_FILES:
                values["stage"] = "selecting"
            artefacts.remove(owner)
            if shared and folder.is_dir():
                files = [path for path in sorted(folder.iterdir()) if path.is_file()]
                values["work_files"] = {path.name: artefacts.put(owner, path.name, path).hex() for path in files}
            connection.execute(jobs.update().where(jobs.c.id == row.id).values(values))


def _fetch(artefacts: Artefacts, owner: str, work_files: dict[str, str], folder: Path) -> None:
    """Make a job's folder from the copies of its files, unless one is missing."""
    folder.mkdir(parents=True)
    try:
        for name, sha256 in work_files.items():
            with artefacts.on_disk(owner, name, folder, bytes.fromhex(sha256)) as path:
                shutil.copyfile(path, folder / name)
    except (NotYours, Corrupt):
        shutil.rmtree(folder)


def _fill(database: Database, copy: Database) -> None:
    if not database.is_empty():
        raise InvalidInput(f"the database {database.shown} is not empty; restore to an empty one")
    database.migrate()
    with copy.reading() as source:
        _copy_rows(source, database)
    database.close()


def _upload(folder: Path, artefacts: Artefacts) -> None:
    for path in sorted(folder.glob("*/*")):
        artefacts.place(path.parent.name, path.name, path)


def _add_file(tar: tarfile.TarFile, name: str, path: Path, described: dict[str, dict[str, object]]) -> None:
    with suppress(FileNotFoundError), path.open("rb") as reader:
        _add(tar, name, reader, described)


def _add(tar: tarfile.TarFile, name: str, reader: IO[bytes], described: dict[str, dict[str, object]]) -> None:
    # Copied first: a tar member's size is written before its content, and the file may be replaced meanwhile.
    with tempfile.SpooledTemporaryFile(max_size=64 << 20) as copy:
        digest, size = hashlib.sha256(), 0
        while block := reader.read(1 << 20):
            digest.update(block)
            size += copy.write(block)
        copy.seek(0)
        member = tarfile.TarInfo(name)
        member.size, member.mode = size, 0o600
        tar.addfile(member, copy)
    described[name] = {"sha256": digest.hexdigest(), "bytes": size}


def _unpack(source: Path, folder: Path) -> None:
    """Write the members of a backup to ``folder``, checked. Raises InvalidInput."""
    found: dict[str, dict[str, object]] = {}
    wanted: dict[str, Any] | None = None
    try:
        with tarfile.open(source, "r:") as tar:
            for member in tar:
                reader = tar.extractfile(member) if member.isreg() else None
                if reader is None:
                    raise InvalidInput(f"{source} is no backup: {member.name[:64]!r} is not a file")
                if member.name == _MANIFEST:
                    wanted = json.loads(reader.read(64 << 20))
                elif member.name == _DATABASE or _is_ours(member.name):
                    found[member.name] = _write(reader, _target(folder, member.name))
                else:
                    raise InvalidInput(f"{source} is no backup: it holds {member.name[:64]!r}")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise InvalidInput(f"{source} is damaged, or no backup of 'isthmus cloud backup'") from error
    if wanted is None or wanted.get("format") != _FORMAT or wanted.get("files") != found or _DATABASE not in found:
        raise InvalidInput(f"{source} is damaged or incomplete; take another backup")


def _is_ours(name: str) -> bool:
    return _MEMBER.fullmatch(name) is not None and all(map(valid_stored_name, name.split("/")))


def _target(folder: Path, name: str) -> Path:
    return folder / name.removeprefix("state/")


def _write(reader: IO[bytes], path: Path) -> dict[str, object]:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    digest, size = hashlib.sha256(), 0
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        while block := reader.read(1 << 20):
            digest.update(block)
            size += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "bytes": size}
