"""Freed memory goes back to the system, and a system that cannot take it is no trouble."""

import ctypes

import pytest

from isthmus.edge.student import memory


def test_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Library:
        @staticmethod
        def malloc_trim(pad: int) -> int:
            asked.append(pad)
            return 1

    monkeypatch.setattr(memory, "_trim", memory._trim.__wrapped__)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    memory.give_back()
    assert asked == [0]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # another C library
    memory.give_back()
    assert asked == [0]
