"""Freed memory goes back to the system, and a system that cannot take it is no trouble."""

import ctypes
import subprocess
import sys

import pytest

from isthmus.data import memory


class Glibc:
    """What is asked of the C library."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []
        self.gnu_get_libc_version = "2.36"

    def malloc_trim(self, pad: int) -> int:
        self.asked.append((pad,))
        return 1

    def mallopt(self, option: int, value: int) -> int:
        self.asked.append((option, value))
        return 1


@pytest.mark.parametrize("glibc", [True, False])
def test_only_glibc_is_asked(monkeypatch: pytest.MonkeyPatch, glibc: bool) -> None:
    library = Glibc()
    if not glibc:
        del library.gnu_get_libc_version
    monkeypatch.setattr(memory, "_of_glibc", memory._of_glibc.__wrapped__)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    memory.give_back()
    memory.keep_little.__wrapped__()
    assert library.asked == ([(0,), (-3, 256 << 10)] if glibc else [])


CHILD = """
from pathlib import Path
import numpy as np
from isthmus.data import memory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

memory.keep_little()
before = resident()
for _ in range(3):
    held = [np.ones(1 << 19, np.uint8) for _ in range(40)]
    most = resident() - before
    kept = held.pop()  # A heap that grew to here could not shrink below it.
    del held
print(most >> 20, resident() - before >> 20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="of glibc")
def test_large_blocks_are_not_kept() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", CHILD], capture_output=True, text=True, check=True)
    most, left = map(int, done.stdout.split())
    assert most >= 19, "20 MB were held"
    assert left <= 3, "and all but one of half a megabyte went back"
