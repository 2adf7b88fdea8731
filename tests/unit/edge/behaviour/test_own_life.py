"""When a device that captures its own clips personalises."""

from dataclasses import replace

import pytest

from isthmus.edge.behaviour.own_life import AGAIN_AFTER_S, Clips, Task, due
from isthmus.edge.behaviour.state import Answering, Phase, Purpose, State, answering, personalise_again

BASE = State(phase=Phase.ENCODE, active_id="base", base_id="base")
SERVING = State(phase=Phase.SERVE, active_id="final", base_id="base", done=True)
NONE = Clips(0, 0, None, True)
PLENTY = Clips(30, 30, None, True)


def test_a_new_device_prepares_and_then_waits_for_clips() -> None:
    assert due(State(), NONE, 24) is Task.PREPARE
    assert due(replace(BASE, phase=Phase.SWAP, active_id=""), PLENTY, 24) is Task.PREPARE
    assert due(BASE, NONE, 24) is None
    assert due(BASE, Clips(23, 23, None, True), 24) is None
    assert due(BASE, PLENTY, 24) is Task.PERSONALISE


@pytest.mark.parametrize("phase", [Phase.UPLOAD, Phase.WATCH, Phase.JUDGE])
def test_what_was_begun_is_finished_even_without_clips(phase: Phase) -> None:
    assert due(replace(BASE, phase=phase, job_id="job"), NONE, 24) is Task.PERSONALISE
    interim = replace(BASE, purpose=Purpose.INTERIM, round=1)
    assert due(interim, NONE, 24) is Task.PERSONALISE


def test_a_personal_device_begins_anew_only_with_new_clips_after_a_day_and_within_its_budget() -> None:
    ready = Clips(30, 24, AGAIN_AFTER_S, True)
    assert due(SERVING, ready, 24) is Task.AGAIN
    assert due(SERVING, replace(ready, new=23), 24) is None
    assert due(SERVING, replace(ready, stored=23), 24) is None
    assert due(SERVING, replace(ready, since_s=AGAIN_AFTER_S - 1), 24) is None
    assert due(SERVING, replace(ready, since_s=-86_400.0), 24) is None, "the clock was set back"
    assert due(SERVING, replace(ready, affordable=False), 24) is None
    assert due(BASE, replace(ready, affordable=False), 24) is None


def test_a_personal_student_asks_the_cloud_while_the_next_personalisation_waits_to_begin() -> None:
    again = personalise_again(replace(SERVING, link_up=True))
    waiting = replace(again, link_up=True)
    assert due(waiting, replace(PLENTY, affordable=False), 24) is None
    assert answering(waiting, finished=True) is Answering.CLOUD
    assert answering(waiting) is Answering.LOCAL, "a base student's user has not chosen that yet"
    assert answering(replace(waiting, link_up=False), finished=True) is Answering.LOCAL
    for begun in (replace(waiting, round=1), replace(waiting, phase=Phase.UPLOAD), replace(waiting, repair_id="x")):
        assert answering(begun, finished=True) is Answering.LOCAL
