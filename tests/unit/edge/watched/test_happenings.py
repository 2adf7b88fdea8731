"""The list of what has just happened: it is bounded, in order, and can be waited on."""

import threading

from isthmus.edge.watched import happenings
from isthmus.edge.watched.happenings import Happenings


def test_events_are_numbered_and_the_oldest_are_dropped() -> None:
    events = Happenings(unix_clock=lambda: 1.0)
    for number in range(happenings.MOST + 5):
        events.note("answered", clip=str(number))
    kept = events.after(0)
    assert [each["number"] for each in kept] == list(range(6, happenings.MOST + 6))
    assert events.after(happenings.MOST + 4) == [
        {"kind": "answered", "number": happenings.MOST + 5, "at_s": 1.0, "clip": str(happenings.MOST + 4)}
    ]
    assert Happenings().life != events.life


def test_one_waits_for_the_next_event_and_no_longer() -> None:
    events = Happenings()
    assert events.after(0, 0.0) == []
    other = threading.Thread(target=events.note, args=("withheld",))
    other.start()
    assert [each["kind"] for each in events.after(0, 5.0)] == ["withheld"]
    other.join()


def test_progress_that_comes_often_is_one_event_per_stage() -> None:
    now_s = 0.0
    events = Happenings(unix_clock=lambda: now_s)
    for done in range(10):
        events.progress(stage="make_prototypes", done=done, total=9)
    assert [each["done"] for each in events.after(0)] == [9], "the newest is shown"
    now_s = 1.0
    events.progress(stage="make_prototypes", done=9, total=9)
    events.progress(stage="upload")
    assert [each["stage"] for each in events.after(1)] == ["make_prototypes", "upload"]
