"""Files of students on the device's disk: errors in words, hashes, deletion."""

import errno
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from isthmus.proto.errors import Corrupt, StorageFull

_BLOCK_BYTES = 1 << 20


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
        if error.errno == errno.EROFS:  # a memory card that fails is often mounted again like this
            raise StorageFull("the disk can only be read; make it writable and it goes on, or use another") from error
        raise


def sha256_of(path: Path) -> bytes:
    """Return the SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.digest()


def delete(path: Path) -> None:
    """Delete a file, a link or a folder with all in it; nothing is there afterwards."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
