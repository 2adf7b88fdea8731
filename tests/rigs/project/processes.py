"""Processes that the process of tests has started, directly or not."""

import psutil


def descendants(*words: str) -> set[int]:
    """Return the ids of those whose command line has one of ``words``. One that ends meanwhile is none of them."""
    found = set()
    for each in psutil.Process().children(recursive=True):
        try:
            line = " ".join(each.cmdline())
        except psutil.Error:
            continue
        if any(word in line for word in words):
            found.add(each.pid)
    return found
