"""What a device does by itself when the cloud offers another release."""

from dataclasses import replace
from typing import Any

import pytest

from isthmus.edge.behaviour.moving import Move, move
from isthmus.edge.behaviour.state import Phase, State, moved, personalise_again

SERVING = State(phase=Phase.SERVE, active_id="final", base_id="base", done=True)


@pytest.mark.parametrize(
    ("facts", "wanted"),
    [
        ({"offered": "a", "active": "a", "previous": ""}, Move.STAY),
        ({"offered": "b", "active": "a", "previous": ""}, Move.AGAIN),
        ({"offered": "b", "active": "a", "previous": "a"}, Move.AGAIN),
        ({"offered": "a", "active": "b", "previous": "a"}, Move.BACK),
        ({"offered": "", "active": "a", "previous": "b"}, Move.STAY),
        ({"offered": "b", "active": "", "previous": "b"}, Move.STAY),
    ],
)
def test_it_goes_to_the_offered_release_and_back_to_a_student_that_it_has(facts: dict[str, str], wanted: Move) -> None:
    assert move(SERVING, **facts) is wanted


@pytest.mark.parametrize(
    "changes", [{"phase": Phase.WATCH}, {"phase": Phase.ENCODE}, {"repair_id": "final"}, {"active_id": ""}]
)
def test_it_finishes_first_what_it_has_begun(changes: dict[str, Any]) -> None:
    assert move(replace(SERVING, **changes), offered="b", active="a", previous="b") is Move.STAY


def test_each_offer_is_followed_once() -> None:
    """A new student that was refused, or that the person left by a rollback, is not made again and again."""
    tried = moved(SERVING, "b")
    assert move(tried, offered="b", active="a", previous="") is Move.STAY
    assert move(tried, offered="b", active="a", previous="b") is Move.STAY, "the person went back"
    assert move(tried, offered="c", active="a", previous="") is Move.AGAIN
    withdrawn = moved(tried, "a")
    assert move(withdrawn, offered="b", active="a", previous="") is Move.AGAIN, "it is offered anew"
    assert personalise_again(tried).moved_to == "b"
