"""The state machine of a job, driven by events."""

from dataclasses import replace

import pytest

from isthmus.cloud.personalise.job import (
    MAX_ATTEMPTS,
    Discard,
    Distil,
    Distilled,
    EpochDone,
    Event,
    Expired,
    Export,
    Exported,
    Failed,
    HeadsTrained,
    Job,
    Select,
    Selected,
    Stalled,
    Taken,
    TrainHeads,
    Uploaded,
    status,
    step,
)
from isthmus.proto.errors import OutOfOrder, WrongState
from isthmus.proto.messages import Stage


def a_job(rounds: int = 1) -> Job:
    return Job("job1", "dev1", "key", "release", seed=0, rounds=rounds, created_s=100.0, updated_s=100.0)


def after(job: Job, *events: Event, start_s: float = 100.0) -> Job:
    """Return the job after the events, one second apart."""
    for second, event in enumerate(events, start=1):
        job, _ = step(job, event, start_s + second)
    return job


def test_one_round_goes_straight_to_ready_and_names_each_action() -> None:
    job, seen = a_job(), []
    events = (Taken(), Selected((3, 1)), EpochDone(1, 2), EpochDone(2, 2), Distilled(), HeadsTrained(), Exported("s"))
    for second, event in enumerate(events, start=101):
        job, actions = step(job, event, float(second))
        seen.extend(actions)
    assert seen == [Select(0), Distil(0), TrainHeads(0), Export(0, final=True), Discard()]
    assert (job.stage, job.student_id, job.progress) == (Stage.READY, "s", 1.0)
    assert job.selected_per_class == (3, 1)


def test_between_rounds_the_interim_student_is_exported_and_prototypes_awaited() -> None:
    job = after(a_job(rounds=2), Taken(), Selected((1,)), Distilled())
    assert job.stage is Stage.EXPORTING
    job, actions = step(job, Exported("interim"), 110.0)
    assert (job.stage, job.round, job.student_id, actions) == (Stage.AWAITING_PROTOTYPES, 1, "interim", ())
    job, actions = step(job, Uploaded(1), 120.0)
    assert (job.stage, actions) == (Stage.SELECTING, (Select(1),))


def test_a_round_whose_selection_has_settled_is_the_last() -> None:
    second = after(a_job(rounds=4), Taken(), Selected((1,), settled=True), Distilled(), Exported("s"), Uploaded(1))
    assert not second.settled, "in round 0 there is nothing to compare with"
    settled, actions = step(second, Selected((2,), settled=True), 120.0)
    assert (settled.stage, settled.settled, actions) == (Stage.DISTILLING, True, (Distil(1),))
    assert (status(settled).settled, status(settled).round, status(settled).rounds) == (True, 1, 4)
    compressing, actions = step(settled, Distilled(), 130.0)
    assert (compressing.stage, actions) == (Stage.COMPRESSING, (TrainHeads(1),))
    ready = after(compressing, HeadsTrained(), Exported("final"), start_s=140.0)
    assert (ready.stage, ready.student_id, ready.progress, ready.round) == (Stage.READY, "final", 1.0, 1)


def test_the_last_planned_round_cuts_nothing() -> None:
    last = after(a_job(rounds=2), Taken(), Selected((1,)), Distilled(), Exported("s"), Uploaded(1))
    job, _ = step(last, Selected((1,), settled=True), 200.0)
    assert not job.settled


def test_an_upload_of_another_round_or_in_another_stage_is_refused() -> None:
    awaiting = after(a_job(rounds=3), Taken(), Selected((1,)), Distilled(), Exported("s"))
    for wrong in (0, 2):
        with pytest.raises(OutOfOrder, match="round 1 are awaited"):
            step(awaiting, Uploaded(wrong), 200.0)
    with pytest.raises(WrongState, match="distilling"):
        step(after(a_job(), Taken(), Selected((1,))), Uploaded(1), 200.0)


@pytest.mark.parametrize(
    ("events", "again"),
    [
        ((Taken(),), Select(0)),
        ((Taken(), Selected((1,))), Distil(0)),
        ((Taken(), Selected((1,)), Distilled()), TrainHeads(0)),
        ((Taken(), Selected((1,)), Distilled(), HeadsTrained()), Export(0, final=True)),
    ],
)
def test_a_job_taken_again_after_a_crash_repeats_its_stage(events: tuple[Event, ...], again: object) -> None:
    job = after(a_job(), *events)
    taken, actions = step(job, Taken(), 1_000.0)
    assert (taken.stage, actions) == (job.stage, (again,))
    assert taken.stage_seconds == job.stage_seconds, "the time during which the server was down does not count as work"


def test_a_job_that_kills_its_worker_again_and_again_fails() -> None:
    job = after(a_job(), Taken(), Selected((1,)))
    for _ in range(3 * MAX_ATTEMPTS):
        job, actions = step(job, Taken(), 200.0)
        assert actions == (Distil(0),), "a worker that is stopped from outside is no failure of the job"
    for _ in range(MAX_ATTEMPTS - 1):
        job, actions = step(job, Taken(crashed=True), 200.0)
        assert actions == (Distil(0),)
    job, actions = step(job, Taken(crashed=True), 200.0)
    assert (job.stage, actions) == (Stage.FAILED, (Discard(),))
    assert "distilling" in job.error


def test_an_epoch_done_counts_as_getting_somewhere() -> None:
    job = after(a_job(), Taken(), Selected((1,)))
    for epoch in range(1, 3 * MAX_ATTEMPTS):
        job = after(job, Taken(crashed=True), EpochDone(epoch, 50))
    assert job.stage is Stage.DISTILLING


def test_a_stalled_job_keeps_its_stage_and_waits_longer_each_time_and_for_ever() -> None:
    job = after(a_job(), Taken(), Selected((1,)))
    waits = []
    for _ in range(1_200):
        job, _ = step(job, Taken(), 200.0)
        job, actions = step(job, Stalled("the disk is full"), 200.0)
        assert (job.stage, actions, job.error) == (Stage.DISTILLING, (), "the disk is full")
        waits.append(job.not_before_s - 200.0)
    assert waits[:6] == sorted(set(waits[:6]))
    assert max(waits) == 300.0, "it goes on within five minutes of there being space"
    job, _ = step(job, EpochDone(1, 2), 900.0)
    assert (job.error, job.stalls) == ("", 0)


def test_seconds_go_to_the_stage_in_which_they_were_spent() -> None:
    job = after(a_job(), Taken(), Selected((1,)), EpochDone(1, 2), Distilled(), HeadsTrained(), Exported("s"))
    assert job.stage_seconds == {
        "queued": 1.0,
        "selecting": 1.0,
        "distilling": 2.0,
        "compressing": 1.0,
        "exporting": 1.0,
    }


def test_a_clock_set_back_takes_no_time_away() -> None:
    job = after(a_job(), Taken(), start_s=500.0)
    job, _ = step(job, Selected((1,)), 10.0)
    assert job.stage_seconds["selecting"] == 0.0


def test_the_time_left_follows_from_the_share_done() -> None:
    job = replace(a_job(), stage=Stage.DISTILLING, progress=0.25, stage_seconds={"queued": 900.0, "distilling": 10.0})
    assert status(job).eta_s == pytest.approx(30.0)
    assert status(a_job()).eta_s == 0.0


def test_a_device_that_never_comes_back_ends_the_job() -> None:
    job = after(a_job(rounds=2), Taken(), Selected((1,)), Distilled(), Exported("s"), Expired())
    assert job.stage is Stage.FAILED
    assert "round 1" in job.error


def test_what_has_ended_stays_so() -> None:
    failed = after(a_job(), Taken(), Failed("no"))
    for event in (Taken(), Failed("again"), Exported("s"), Uploaded(1), Stalled("x")):
        with pytest.raises(WrongState):
            step(failed, event, 500.0)
