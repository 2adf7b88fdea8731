"""The agent's life as a sequence of events and actions."""

from dataclasses import replace

import pytest

from isthmus.edge.behaviour import events
from isthmus.edge.behaviour.pauses import BACKOFF_MOST_S, HINT_MOST_S, MOST_REFUSALS, TROUBLE_MOST_S, backoff_s
from isthmus.edge.behaviour.state import Answering, Phase, Purpose, State, answering, enrol_anew, personalise_again
from isthmus.edge.behaviour.step import step
from isthmus.edge.own_clips.budget import BudgetSpent
from isthmus.proto.errors import (
    Busy,
    Corrupt,
    Internal,
    InvalidInput,
    IsthmusError,
    NotYours,
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


def job(stage: Stage, round: int = 0, student_id: str = "", error: str = "") -> events.JobChanged:
    return events.JobChanged(JobStatus("job", stage, round=round, rounds=2, student_id=student_id, error=error))


def test_the_whole_life() -> None:
    expected_by_event: list[tuple[events.Event, list[events.Action]]] = [
        (events.Started(), [events.Enrol()]),
        (events.Enrolled(), [events.Fetch("")]),
        (events.Fetched("base"), [events.Verify("base")]),
        (events.Verified("base"), [events.Swap("base")]),
        (events.Swapped("base"), [events.MakePrototypes("base", 0)]),
        (events.Encoded(0), [events.Upload("", 0)]),
        (events.Accepted(0, JobStatus("job", Stage.QUEUED)), [events.Watch("job")]),
        (job(Stage.SELECTING), []),
        (job(Stage.DISTILLING), []),
        (job(Stage.AWAITING_PROTOTYPES, 1, "interim"), [events.Fetch("interim")]),
        (events.Fetched("interim"), [events.Verify("interim")]),
        (events.Verified("interim"), [events.MakePrototypes("interim", 1)]),
        (events.Encoded(1), [events.Upload("job", 1)]),
        (events.Accepted(1, JobStatus("job", Stage.SELECTING, round=1)), [events.Watch("job")]),
        (job(Stage.AWAITING_PROTOTYPES, 1, "interim"), []),
        (job(Stage.READY, 1, "final"), [events.Fetch("final")]),
        (events.Fetched("final"), [events.Verify("final")]),
        (events.Verified("final"), [events.Judge("base", "final")]),
        (events.Judged("other", True, "not this one"), []),
        (events.Judged("final", True, "better"), [events.Swap("final")]),
        (events.Swapped("final"), [events.Serve()]),
    ]
    state = State()
    for event, expected in expected_by_event:
        state, actions = step(state, event, 0.0)
        assert list(actions) == expected, event
    assert (state.active_id, state.base_id, state.failure) == ("final", "base", "")
    assert (state.verdict, state.refused_id) == ("better", "")
    assert answering(state) is Answering.CLOUD


def test_a_refused_student_is_not_swapped_in_and_the_present_one_serves() -> None:
    judging = State(phase=Phase.JUDGE, purpose=Purpose.FINAL, wanted_id="new", active_id="base", base_id="base")
    judging, actions = step(judging, events.Started(), 0.0)
    assert actions == (events.Judge("base", "new"),)
    state, actions = step(judging, events.Judged("new", False, "it is not good enough"), 0.0)
    assert actions == (events.Serve(),)
    assert (state.active_id, state.refused_id, state.verdict) == ("base", "new", "it is not good enough")
    assert state.failure == "", "a refusal is no failure"
    again = personalise_again(state)
    assert (again.active_id, again.refused_id, again.verdict) == ("base", "", "")


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.STOPPED])
def test_a_restart_repeats_the_present_action(phase: Phase) -> None:
    state = State(phase=phase, wanted_id="s", active_id="a", job_id="job", retry_at_s=99.0, attempt=7)
    restarted, actions = step(state, events.Started(), 0.0)
    assert len(actions) == 1
    assert (restarted.phase, restarted.retry_at_s, restarted.attempt) == (phase, None, 0)


def test_the_link_goes_and_comes_back_after_a_backoff() -> None:
    state, actions = step(WATCHING, events.Failed(Unavailable("gone"), jitter=0.0), 100.0)
    assert actions == (events.Wait(100.25),)
    assert not state.link_up
    assert step(state, events.Tick(), 100.1)[1] == (events.Wait(100.25),)
    state, actions = step(state, events.Tick(), 100.25)
    assert actions == (events.Watch("job"),)
    state, _ = step(state, job(Stage.SELECTING), 101.0)
    assert (state.link_up, state.attempt) == (True, 0)


@pytest.mark.parametrize("state", [WATCHING, SERVING, State(phase=Phase.ENROL)], ids=lambda state: state.phase.value)
def test_a_busy_cloud_says_when_to_try_again(state: State) -> None:
    def pause_s(hint_s: float | None, jitter: float, attempt: int = 0) -> float | None:
        busy = events.Failed(Busy("busy", retry_after_s=hint_s), jitter)
        return step(replace(state, attempt=attempt), busy, 0.0)[0].retry_at_s

    assert pause_s(None, 0.0) == 0.25
    assert (pause_s(8.0, 0.0), pause_s(8.0, 0.5)) == (8.0, 10.0), "not before that time, and not all devices at once"
    assert pause_s(1e9, 0.0) == HINT_MOST_S, "no cloud can silence a device for good"
    assert pause_s(0.1, 0.0, attempt=6) == backoff_s(7, 0.0), "a hint does not shorten a pause that has grown"


def test_backoff_doubles_up_to_a_minute() -> None:
    waits = [backoff_s(attempt, jitter=1.0) for attempt in range(1, 12)]
    assert waits[:4] == [0.5, 1.0, 2.0, 4.0]
    assert waits[-1] == BACKOFF_MOST_S
    assert backoff_s(10_000, jitter=0.0) == BACKOFF_MOST_S / 2


def test_the_link_may_be_gone_for_days() -> None:
    state, now_s = WATCHING, 0.0
    for _ in range(10_000):
        state, (wait,) = step(state, events.Failed(Unavailable("gone"), jitter=0.5), now_s)
        assert isinstance(wait, events.Wait)
        now_s = wait.until_s
        state, actions = step(state, events.Tick(), now_s)
        assert actions == (events.Watch("job"),)
    assert state.phase is Phase.WATCH
    assert now_s > 5 * 24 * 3600


def test_a_watch_that_ends_early_is_renewed() -> None:
    state, (wait,) = step(WATCHING, events.WatchEnded(0.0), 0.0)
    assert isinstance(wait, events.Wait)
    assert step(state, events.Tick(), wait.until_s)[1] == (events.Watch("job"),)


@pytest.mark.parametrize("error", [Corrupt("hash"), StorageFull("full"), Internal("reference 1")])
def test_other_errors_are_tried_again_for_ever_after_pauses_that_grow_to_an_hour(error: IsthmusError) -> None:
    state = State(phase=Phase.VERIFY, purpose=Purpose.FINAL, wanted_id="new", active_id="base", base_id="base")
    now_s, pauses = 0.0, []
    for _ in range(20):
        state, (wait,) = step(state, events.Failed(error, 0.9), now_s)
        assert isinstance(wait, events.Wait)
        assert (state.phase, state.active_id, state.failure) == (Phase.FETCH, "base", str(error))
        assert answering(state) is Answering.LOCAL
        pauses.append(round(wait.until_s - now_s, 3))
        now_s = wait.until_s
        state, actions = step(state, events.Tick(), now_s)
        assert actions == (events.Fetch("new"),)
        state, actions = step(state, events.Fetched("new"), now_s)
        assert actions == (events.Verify("new"),)
    assert pauses == sorted(pauses)
    assert 0.9 * TROUBLE_MOST_S < pauses[-1] <= TROUBLE_MOST_S
    state, _ = step(state, events.Verified("new"), now_s)
    assert (state.phase, state.failure, state.refusals) == (Phase.JUDGE, "", 0)


@pytest.mark.parametrize("error", [Unauthenticated("unknown token"), InvalidInput("no"), BudgetSpent("spent")])
def test_what_a_person_must_mend_is_tried_again_less_often(error: IsthmusError) -> None:
    state, (wait,) = step(State(phase=Phase.ENCODE, active_id="base"), events.Failed(error, 0.0), 0.0)
    assert wait == events.Wait(32.0)
    assert state.refusals > MOST_REFUSALS
    assert step(state, events.Tick(), 32.0)[1] == (events.MakePrototypes("base", 0),)


def test_a_device_that_an_earlier_version_stopped_starts_again() -> None:
    state, actions = step(State(phase=Phase.STOPPED, failure="the enrolment key is wrong"), events.Started(), 0.0)
    assert actions == (events.Enrol(),)
    assert state.failure == ""
    given_up = State(phase=Phase.SERVE, active_id="base", base_id="base", job_id="job", failure="the server failed")
    assert step(given_up, events.Started(), 0.0)[1] == (events.Watch("job"),)
    assert step(replace(given_up, job_id=""), events.Started(), 0.0)[1] == (events.MakePrototypes("base", 0),)


def test_a_final_student_that_cannot_run_is_refused_at_once() -> None:
    state = State(phase=Phase.VERIFY, purpose=Purpose.FINAL, wanted_id="new", active_id="base", base_id="base")
    state, actions = step(state, events.Failed(InvalidInput("it loops"), 0.0), 0.0)
    assert actions == (events.Serve(),)
    assert (state.active_id, state.refused_id, state.verdict, state.failure) == ("base", "new", "it loops", "")


@pytest.mark.parametrize(
    "event",
    [job(Stage.FAILED, error="no memory"), job(Stage.READY), events.Failed(NotYours("no such job"), 0.0)],
)
def test_a_job_that_failed_or_is_gone_is_started_again_with_the_same_prototypes(event: events.Event) -> None:
    began = replace(WATCHING, round=1, uploaded_round=1, most_rounds=3)
    state, (wait,) = step(began, event, 0.0)
    assert isinstance(wait, events.Wait)
    assert wait.until_s >= 30
    assert state.failure
    assert (state.active_id, state.most_rounds, state.jobs) == ("base", 2, 1), "an upload of round 1 remains counted"
    state, actions = step(state, events.Tick(), wait.until_s)
    assert actions == (events.Upload("", 0),)
    state, actions = step(state, events.Accepted(0, JobStatus("second", Stage.QUEUED)), 100.0)
    assert actions == (events.Watch("second"),)


def test_no_more_rounds_than_the_person_allows() -> None:
    state, _ = step(replace(WATCHING, uploaded_round=-1, phase=Phase.ENCODE), events.Started(most_rounds=2), 0.0)
    watching = replace(state, phase=Phase.WATCH, uploaded_round=1)
    asked, (wait,) = step(watching, job(Stage.AWAITING_PROTOTYPES, 2, "interim"), 0.0)
    assert isinstance(wait, events.Wait)
    assert "2 are allowed" in asked.failure
    again, actions = step(asked, events.Tick(), wait.until_s)
    assert actions == (events.Watch("job"),)
    more, _ = step(again, events.Started(most_rounds=9), 0.0)
    assert more.most_rounds == 2, "a personalisation under way is not extended"


def test_a_damaged_student_is_fetched_again_while_another_answers() -> None:
    state, actions = step(SERVING, events.Damaged("final", "base"), 0.0)
    assert actions == (events.Repair("final"),)
    assert (state.active_id, answering(state)) == ("base", Answering.LOCAL)
    state, (wait,) = step(state, events.Failed(NotYours("no such student"), 0.0), 0.0)
    assert isinstance(wait, events.Wait)
    assert step(state, events.Started(), 0.0)[1] == (events.Repair("final"),)
    state, actions = step(state, events.Tick(), wait.until_s)
    assert actions == (events.Repair("final"),)
    state, actions = step(state, events.Repaired("final"), 0.0)
    assert actions == (events.Serve(),)
    assert (state.active_id, state.repair_id, state.failure) == ("final", "", "")


def test_a_damaged_student_in_mid_job_does_not_lose_the_job() -> None:
    state, actions = step(WATCHING, events.Damaged("base", ""), 0.0)
    assert actions == (events.Repair("base"),)
    assert answering(state) is Answering.NOT_YET
    _, actions = step(state, events.Repaired("base"), 0.0)
    assert actions == (events.Watch("job"),)
    lost, actions = step(state, events.Failed(NotYours("no such student"), 0.0), 0.0)
    assert actions == (events.Fetch(""),)
    assert lost.repair_id == ""


def test_a_lost_identity_is_replaced_and_sound_students_stay() -> None:
    anew = enrol_anew(SERVING)
    assert step(anew, events.Started(), 0.0)[1] == (events.Enrol(),)
    state, actions = step(anew, events.Enrolled(keeps=True), 0.0)
    assert (state.active_id, actions) == ("final", (events.Serve(),))
    state, actions = step(anew, events.Enrolled(keeps=False), 0.0)
    assert (state.active_id, actions) == ("", (events.Fetch(""),))
    under_way = replace(WATCHING, uploaded_round=1, most_rounds=3)
    state, actions = step(enrol_anew(under_way), events.Enrolled(keeps=True), 0.0)
    assert actions == (events.MakePrototypes("base", 0),)
    assert (state.most_rounds, state.jobs) == (2, 1), "an upload of round 1 remains counted"


def test_bytes_that_came_reset_the_pause() -> None:
    state = State(phase=Phase.FETCH, attempt=9)
    gone = Unavailable("gone")
    assert step(state, events.Failed(gone, 0.0, progress=True), 0.0)[1] == (events.Wait(0.25),)
    assert step(state, events.Failed(gone, 0.0), 0.0)[1] == (events.Wait(30.0),)


def test_an_upload_whose_answer_was_lost() -> None:
    uploading = State(phase=Phase.UPLOAD, active_id="base", job_id="job", round=1, uploaded_round=0)
    state, actions = step(uploading, events.Failed(WrongState("already here"), 0.0), 0.0)
    assert actions == (events.Watch("job"),)
    assert state.uploaded_round == 1


def test_a_busy_cloud_is_asked_again() -> None:
    state, actions = step(State(phase=Phase.UPLOAD, active_id="base"), events.Failed(Busy("later"), 0.0), 0.0)
    assert isinstance(actions[0], events.Wait)
    assert state.phase is Phase.UPLOAD


def test_while_serving_the_device_falls_back_to_itself() -> None:
    state, _ = step(SERVING, events.Failed(Unavailable("gone"), 0.0), 0.0)
    assert answering(state) is Answering.LOCAL
    state, _ = step(state, events.Tick(), 60.0)
    assert answering(state) is Answering.CLOUD
    unchanged, _ = step(SERVING, events.Failed(InvalidInput("one bad frame"), 0.0), 0.0)
    assert unchanged == SERVING


def test_another_jobs_news_is_not_ours() -> None:
    news = events.JobChanged(JobStatus("other", Stage.READY, student_id="other"))
    assert step(WATCHING, news, 0.0) == (WATCHING, ())


def test_again_starts_from_the_present_student() -> None:
    state, actions = step(personalise_again(SERVING), events.Started(), 0.0)
    assert actions == (events.MakePrototypes("final", 0),)
    assert (state.base_id, state.job_id, state.uploaded_round) == ("final", "", -1)
