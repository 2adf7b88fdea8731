"""An actor is kept for the next step, taken once, and ended in its own time."""

import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from isthmus.cloud.personalise.elsewhere import kept
from isthmus.cloud.personalise.elsewhere.kept import KeptActor


class Actor:
    """An actor that answers with its number while it lives."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.alive = True
        self.pid = SimpleNamespace(remote=lambda: self)


class Timer:
    """A timer whose time is over when the test says so."""

    made: list["Timer"]

    def __init__(self, interval_s: float, function: Any) -> None:
        self.function = function
        self.cancelled = False
        self.made.append(self)

    def start(self) -> None: ...

    def cancel(self) -> None:
        self.cancelled = True

    def over(self) -> None:
        if not self.cancelled:
            self.function()


@pytest.fixture(autouse=True)
def timers(monkeypatch: pytest.MonkeyPatch) -> list[Timer]:
    def pid(actor: Actor, timeout: float | None = None) -> int:
        if not actor.alive:
            raise RuntimeError("the actor has died")
        return actor.number

    def kill(actor: Actor) -> None:
        actor.alive = False

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=pid, kill=kill))
    monkeypatch.setattr(kept.cluster, "first_answer", lambda actor, within_s: pid(actor))
    monkeypatch.setattr(kept, "threading", SimpleNamespace(Timer=Timer, Lock=threading.Lock))
    Timer.made = []
    return Timer.made


def test_a_kept_actor_is_taken_once_and_a_dead_one_never(timers: list[Timer]) -> None:
    holder, made = KeptActor(), [Actor(number) for number in range(3)]
    left = iter(made)
    assert holder.take(lambda: next(left), 1.0) == (made[0], 0)
    holder.keep(made[0])
    assert holder.take(lambda: next(left), 1.0) == (made[0], 0)
    timers[0].over()
    assert made[0].alive, "whoever has taken it is not disturbed"
    assert holder.take(lambda: next(left), 1.0) == (made[1], 1), "one that is at work is not there to be taken"
    holder.keep(made[1])
    made[1].alive = False
    assert holder.take(lambda: next(left), 1.0) == (made[2], 2)
    holder.keep(made[2])
    timers[-1].over()
    assert not made[2].alive, "its time is over"


def test_of_two_kept_actors_the_later_one_stays_for_its_own_time(timers: list[Timer]) -> None:
    holder, first, second = KeptActor(), Actor(1), Actor(2)
    holder.keep(first)
    holder.keep(second)
    assert (first.alive, second.alive) == (False, True)
    timers[0].over()
    assert second.alive, "the time of the first one is not its own"
    holder.let_go()
    assert not second.alive


def test_a_new_actor_that_does_not_answer_is_ended() -> None:
    actor = Actor(1)

    def died(actor: Actor, within_s: float) -> int:
        raise ConnectionError("the cluster is gone")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(kept.cluster, "first_answer", died)
        KeptActor().take(lambda: actor, 1.0)
    assert not actor.alive
