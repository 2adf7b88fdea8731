"""The agent's life as a sequence of events and actions."""

import pytest

from isthmus.edge.agent import behaviour
from isthmus.edge.agent.behaviour import Phase, Purpose, State, step
from isthmus.proto.errors import (
    Busy,
    Corrupt,
    InvalidInput,
    IsthmusError,
    StorageFull,
    Unauthenticated,
    Unavailable,
    WrongState,
)
from isthmus.proto.messages import JobStatus, Stage

WATCHING = State(
    phase=Phase.WATCH, active_id="base", base_id="base", job_id="job", uploaded_round=0, wanted_id="base", link_up=True
)
SERVING = State(phase=Phase.SERVE, active_id="final", base_id="base", link_up=True)


def job(stage: Stage, round: int = 0, student_id: str = "", error: str = "") -> behaviour.JobChanged:
    return behaviour.JobChanged(JobStatus("job", stage, round=round, rounds=2, student_id=student_id, error=error))


def test_the_whole_life() -> None:
    expected_by_event: list[tuple[behaviour.Event, list[behaviour.Action]]] = [
        (behaviour.Started(), [behaviour.Enrol()]),
        (behaviour.Enrolled(), [behaviour.Fetch("")]),
        (behaviour.Fetched("base"), [behaviour.Verify("base")]),
        (behaviour.Verified("base"), [behaviour.Swap("base")]),
        (behaviour.Swapped("base"), [behaviour.MakePrototypes("base", 0)]),
        (behaviour.Encoded(0), [behaviour.Upload("", 0)]),
        (behaviour.Accepted(0, JobStatus("job", Stage.QUEUED)), [behaviour.Watch("job")]),
        (job(Stage.SELECTING), []),
        (job(Stage.DISTILLING), []),
        (job(Stage.AWAITING_PROTOTYPES, 1, "interim"), [behaviour.Fetch("interim")]),
        (behaviour.Fetched("interim"), [behaviour.Verify("interim")]),
        (behaviour.Verified("interim"), [behaviour.MakePrototypes("interim", 1)]),
        (behaviour.Encoded(1), [behaviour.Upload("job", 1)]),
        (behaviour.Accepted(1, JobStatus("job", Stage.SELECTING, round=1)), [behaviour.Watch("job")]),
        (job(Stage.AWAITING_PROTOTYPES, 1, "interim"), []),
        (job(Stage.READY, 1, "final"), [behaviour.Fetch("final")]),
        (behaviour.Fetched("final"), [behaviour.Verify("final")]),
        (behaviour.Verified("final"), [behaviour.Judge("base", "final")]),
        (behaviour.Judged("other", True, "not this one"), []),
        (behaviour.Judged("final", True, "better"), [behaviour.Swap("final")]),
        (behaviour.Swapped("final"), [behaviour.Serve()]),
    ]
    state = State()
    for event, expected in expected_by_event:
        state, actions = step(state, event, 0.0)
        assert list(actions) == expected, event
    assert (state.active_id, state.base_id, state.failure) == ("final", "base", "")
    assert (state.verdict, state.refused_id) == ("better", "")
    assert behaviour.answering(state) is behaviour.Answering.CLOUD


def test_a_refused_student_is_not_swapped_in_and_the_present_one_serves() -> None:
    judging = State(phase=Phase.JUDGE, purpose=Purpose.FINAL, wanted_id="new", active_id="base", base_id="base")
    judging, actions = step(judging, behaviour.Started(), 0.0)
    assert actions == (behaviour.Judge("base", "new"),)
    state, actions = step(judging, behaviour.Judged("new", False, "it is not good enough"), 0.0)
    assert actions == (behaviour.Serve(),)
    assert (state.active_id, state.refused_id, state.verdict) == ("base", "new", "it is not good enough")
    assert state.failure == "", "a refusal is no failure"
    again = behaviour.personalise_again(state)
    assert (again.active_id, again.refused_id, again.verdict) == ("base", "", "")


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.STOPPED])
def test_a_restart_repeats_the_present_action(phase: Phase) -> None:
    state = State(phase=phase, wanted_id="s", active_id="a", job_id="job", retry_at_s=99.0, attempt=7)
    restarted, actions = step(state, behaviour.Started(), 0.0)
    assert len(actions) == 1
    assert (restarted.phase, restarted.retry_at_s, restarted.attempt) == (phase, None, 0)


def test_the_link_goes_and_comes_back_after_a_backoff() -> None:
    state, actions = step(WATCHING, behaviour.Failed(Unavailable("gone"), jitter=0.0), 100.0)
    assert actions == (behaviour.Wait(100.25),)
    assert not state.link_up
    assert step(state, behaviour.Tick(), 100.1)[1] == (behaviour.Wait(100.25),)
    state, actions = step(state, behaviour.Tick(), 100.25)
    assert actions == (behaviour.Watch("job"),)
    state, _ = step(state, job(Stage.SELECTING), 101.0)
    assert (state.link_up, state.attempt) == (True, 0)


def test_backoff_doubles_up_to_a_minute() -> None:
    waits = [behaviour.backoff_s(attempt, jitter=1.0) for attempt in range(1, 12)]
    assert waits[:4] == [0.5, 1.0, 2.0, 4.0]
    assert waits[-1] == behaviour.BACKOFF_MOST_S
    assert behaviour.backoff_s(10_000, jitter=0.0) == behaviour.BACKOFF_MOST_S / 2


def test_the_link_may_be_gone_for_days() -> None:
    state, now_s = WATCHING, 0.0
    for _ in range(10_000):
        state, (wait,) = step(state, behaviour.Failed(Unavailable("gone"), jitter=0.5), now_s)
        assert isinstance(wait, behaviour.Wait)
        now_s = wait.until_s
        state, actions = step(state, behaviour.Tick(), now_s)
        assert actions == (behaviour.Watch("job"),)
    assert state.phase is Phase.WATCH
    assert now_s > 5 * 24 * 3600


def test_a_watch_that_ends_early_is_renewed() -> None:
    state, (wait,) = step(WATCHING, behaviour.WatchEnded(0.0), 0.0)
    assert isinstance(wait, behaviour.Wait)
    assert step(state, behaviour.Tick(), wait.until_s)[1] == (behaviour.Watch("job"),)


@pytest.mark.parametrize("error", [Corrupt("hash"), StorageFull("full")])
def test_a_bad_download_is_fetched_again_but_not_for_ever(error: IsthmusError) -> None:
    state = State(phase=Phase.VERIFY, purpose=Purpose.FINAL, wanted_id="new", active_id="base", base_id="base")
    for _ in range(behaviour.MOST_REFUSALS):
        state, _ = step(state, behaviour.Failed(error, 0.0), 0.0)
        assert state.phase is Phase.FETCH
        state, actions = step(state, behaviour.Tick(), 1e6)
        assert actions == (behaviour.Fetch("new"),)
        state, actions = step(state, behaviour.Fetched("new"), 0.0)
        assert actions == (behaviour.Verify("new"),)
    state, actions = step(state, behaviour.Failed(error, 0.0), 0.0)
    assert actions == (behaviour.Serve(),)
    assert (state.active_id, state.failure) == ("base", str(error))


def test_what_cannot_be_mended_stops_a_device_without_a_student() -> None:
    state, actions = step(State(), behaviour.Failed(Unauthenticated("the enrolment key is wrong"), 0.0), 0.0)
    assert actions == (behaviour.Stop("the enrolment key is wrong"),)
    assert behaviour.answering(state) is behaviour.Answering.NOT_YET


def test_a_failed_job_leaves_the_old_student_at_work() -> None:
    state, actions = step(WATCHING, job(Stage.FAILED, error="no memory"), 0.0)
    assert actions == (behaviour.Serve(),)
    assert state.active_id == "base"
    assert "no memory" in state.failure


def test_a_finished_job_without_a_student_is_a_failure() -> None:
    state, _ = step(WATCHING, job(Stage.READY), 0.0)
    assert "names no student" in state.failure


def test_an_upload_whose_answer_was_lost() -> None:
    uploading = State(phase=Phase.UPLOAD, active_id="base", job_id="job", round=1, uploaded_round=0)
    state, actions = step(uploading, behaviour.Failed(WrongState("already here"), 0.0), 0.0)
    assert actions == (behaviour.Watch("job"),)
    assert state.uploaded_round == 1


def test_a_busy_cloud_is_asked_again() -> None:
    state, actions = step(State(phase=Phase.UPLOAD, active_id="base"), behaviour.Failed(Busy("later"), 0.0), 0.0)
    assert isinstance(actions[0], behaviour.Wait)
    assert state.phase is Phase.UPLOAD


def test_while_serving_the_device_falls_back_to_itself() -> None:
    state, _ = step(SERVING, behaviour.Failed(Unavailable("gone"), 0.0), 0.0)
    assert behaviour.answering(state) is behaviour.Answering.LOCAL
    state, _ = step(state, behaviour.Tick(), 60.0)
    assert behaviour.answering(state) is behaviour.Answering.CLOUD
    unchanged, _ = step(SERVING, behaviour.Failed(InvalidInput("one bad frame"), 0.0), 0.0)
    assert unchanged == SERVING


def test_another_jobs_news_is_not_ours() -> None:
    news = behaviour.JobChanged(JobStatus("other", Stage.READY, student_id="other"))
    assert step(WATCHING, news, 0.0) == (WATCHING, ())


def test_again_starts_from_the_present_student() -> None:
    state, actions = step(behaviour.personalise_again(SERVING), behaviour.Started(), 0.0)
    assert actions == (behaviour.MakePrototypes("final", 0),)
    assert (state.base_id, state.job_id, state.uploaded_round) == ("final", "", -1)
