"""In any order of events a job stays on the graph of stages and is never lost."""

from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud.personalise.job import (
    MAX_ATTEMPTS,
    RUNNABLE,
    SUCCESSORS,
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
    step,
)
from isthmus.proto.errors import IsthmusError
from isthmus.proto.messages import Stage

events = st.one_of(
    st.builds(Taken, st.booleans()),
    st.builds(Selected, st.tuples(st.integers(0, 9), st.integers(0, 9)), st.booleans()),
    st.builds(EpochDone, st.integers(1, 9), st.integers(9, 9)),
    st.just(Distilled()),
    st.just(HeadsTrained()),
    st.just(Exported("s")),
    st.builds(Uploaded, st.integers(0, 4)),
    st.builds(Stalled, st.text(max_size=400)),
    st.builds(Failed, st.text(max_size=400)),
    st.just(Expired()),
)


def a_job(rounds: int) -> Job:
    return Job("j", "d", "k", "r", seed=0, rounds=rounds, created_s=0.0, updated_s=0.0)


@given(st.integers(1, 4), st.lists(st.tuples(events, st.floats(0, 1e6)), max_size=60))
def test_any_order_of_events_stays_on_the_graph(rounds: int, history: list[tuple[Event, float]]) -> None:
    job = a_job(rounds)
    for event, now_s in history:
        try:
            after, actions = step(job, event, now_s)
        except IsthmusError:
            continue
        assert after.stage is job.stage or after.stage in SUCCESSORS[job.stage]
        assert 0.0 <= job.progress <= after.progress <= 1.0
        assert 0 <= after.round < rounds
        assert after.round in (job.round, job.round + 1)
        assert not (job.settled and not after.settled), "what has settled stays so"
        if after.settled:
            assert 0 < after.round < rounds - 1, "only rounds that are left are cut"
            assert after.stage is not Stage.AWAITING_PROTOTYPES
        assert len(after.error) <= 300
        assert all(seconds >= 0 for seconds in after.stage_seconds.values())
        assert len(actions) <= 1
        if actions:
            assert isinstance(actions[0], Discard) == after.stage.ended
        job = after


def outcome(action: object) -> Event:
    match action:
        case Select():
            return Selected((1, 2))
        case Distil():
            return Distilled()
        case TrainHeads():
            return HeadsTrained()
        case Export():
            return Exported("s")
    raise AssertionError(f"unexpected {action}")


@given(st.integers(1, 4), st.lists(st.tuples(events, st.floats(0, 1e6)), max_size=60))
def test_from_wherever_a_job_is_it_can_still_be_brought_to_its_end(
    rounds: int, history: list[tuple[Event, float]]
) -> None:
    job = a_job(rounds)
    for event, now_s in history:
        try:
            job, _ = step(job, event, now_s)
        except IsthmusError:
            continue
    for _ in range(20 * rounds):
        if job.stage in RUNNABLE:
            job, actions = step(job, Taken(), job.updated_s)
            while actions and not job.stage.ended:
                job, actions = step(job, outcome(actions[0]), job.updated_s)
        elif job.stage is Stage.AWAITING_PROTOTYPES:
            job, _ = step(job, Uploaded(job.round), job.updated_s)
    assert job.stage.ended


@given(
    st.integers(1, 5),
    st.lists(st.integers(0, MAX_ATTEMPTS - 1), min_size=20, max_size=20),
    st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_crashes_in_any_stage_lead_to_the_same_student(rounds: int, crashes: list[int], settle: list[bool]) -> None:
    job, done, turn = a_job(rounds), [], iter(crashes)
    while not job.stage.ended:
        if job.stage is Stage.AWAITING_PROTOTYPES:
            job, actions = step(job, Uploaded(job.round), 0.0)
        else:
            job, actions = step(job, Taken(), 0.0)
        while actions and not job.stage.ended:
            for _ in range(min(next(turn, 0), MAX_ATTEMPTS - 1 - job.attempts)):
                job, actions = step(job, Taken(crashed=True), 0.0)
            done.append(actions[0])
            if isinstance(actions[0], Select):
                job, actions = step(job, Selected((1, 2), settle[actions[0].round]), 0.0)
            else:
                job, actions = step(job, outcome(actions[0]), 0.0)
    # The last round is the first one after round 0 whose selection has settled, else the last planned one.
    rounds_done = next((round + 1 for round in range(1, rounds) if settle[round]), rounds)
    expected: list[object] = []
    for round in range(rounds_done):
        last = round == rounds_done - 1
        expected += [Select(round), Distil(round), *([TrainHeads(round)] if last else []), Export(round, final=last)]
    assert done == expected
    assert (job.stage, job.settled) == (Stage.READY, rounds_done < rounds)
