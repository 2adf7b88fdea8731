"""For any events in any order: no unverified or refused student is swapped in, and the agent always has a next step."""

from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.edge.behaviour import events
from isthmus.edge.behaviour.pauses import TROUBLE_MOST_S
from isthmus.edge.behaviour.state import Phase, Purpose, State
from isthmus.edge.behaviour.step import step
from isthmus.proto import errors
from isthmus.proto.messages import JobStatus, Stage

ids = st.sampled_from(["", "base", "interim", "final"])
jitters = st.floats(0, 1, exclude_max=True)
rounds = st.integers(0, 3)
statuses = st.builds(
    JobStatus,
    job_id=st.sampled_from(["job", "other"]),
    stage=st.sampled_from(Stage),
    round=rounds,
    student_id=ids,
)
failures = st.sampled_from(
    [
        errors.Unavailable("gone"),
        errors.Busy("busy"),
        errors.Busy("busy", retry_after_s=1e9),
        errors.Corrupt("hash"),
        errors.StorageFull("full"),
        errors.WrongState("no"),
        errors.NotYours("no"),
        errors.Internal("no"),
        errors.TooLate("no"),
    ]
)
any_events = st.one_of(
    st.just(events.Started()),
    st.just(events.Enrolled()),
    st.just(events.Tick()),
    st.just(events.Answered()),
    st.builds(events.Fetched, ids),
    st.builds(events.Verified, ids),
    st.builds(events.Judged, ids, st.booleans(), st.just("why")),
    st.builds(events.Swapped, ids),
    st.builds(events.Damaged, ids, ids),
    st.builds(events.Repaired, ids),
    st.builds(events.Encoded, rounds),
    st.builds(events.Accepted, rounds, statuses),
    st.builds(events.JobChanged, statuses),
    st.builds(events.WatchEnded, jitters),
    st.builds(events.Failed, failures, jitters),
)


def fitting(action: events.Action, status: JobStatus, accept: bool = True) -> events.Event:
    """The event that reports success of ``action``, so that random runs get far."""
    match action:
        case events.Enrol():
            return events.Enrolled()
        case events.Fetch(student_id):
            return events.Fetched(student_id or "base")
        case events.Verify(student_id):
            return events.Verified(student_id)
        case events.Judge(_, new_id):
            return events.Judged(new_id, accept, "why")
        case events.Swap(student_id):
            return events.Swapped(student_id)
        case events.MakePrototypes(_, round):
            return events.Encoded(round)
        case events.Upload(_, round):
            return events.Accepted(round, JobStatus("job", Stage.QUEUED))
        case events.Watch():
            return events.JobChanged(status)
        case events.Repair(student_id):
            return events.Repaired(student_id)
        case events.Wait() | events.Serve():
            return events.Tick()


@settings(max_examples=150)
@given(st.lists(st.tuples(st.booleans(), any_events, statuses, st.floats(0, 100), st.booleans()), max_size=60))
def test_random_lives(moments: list[tuple[bool, events.Event, JobStatus, float, bool]]) -> None:
    state, now_s = State(), 0.0
    last: events.Action = events.Enrol()
    fetched_since_verified: dict[str, bool] = {}
    swapped: set[str] = set()
    accepted: dict[str, bool] = {}
    for random_event, event, status, elapsed_s, accept in moments:
        now_s += elapsed_s
        happened = event if random_event else fitting(last, status, accept)
        before = state
        state, actions = step(state, happened, now_s)
        if isinstance(happened, events.Verified) and before.phase is Phase.VERIFY:
            fetched_since_verified[happened.student_id] = True
        if isinstance(happened, events.Fetched) and before.phase is Phase.FETCH:
            fetched_since_verified[happened.student_id] = False
            accepted.pop(happened.student_id, None)
        if isinstance(happened, events.Judged) and before.phase is Phase.JUDGE:
            accepted[happened.student_id] = happened.accept
        for action in actions:
            last = action
            if isinstance(action, events.Swap):
                assert fetched_since_verified.get(action.student_id) is True
                assert action.student_id
                assert state.purpose is Purpose.BASE or accepted.get(action.student_id) is True
                swapped.add(action.student_id)
            if isinstance(action, events.Wait):
                assert now_s < action.until_s <= now_s + TROUBLE_MOST_S or isinstance(happened, events.Tick)
            if isinstance(action, events.Judge):
                assert action.old_id == state.active_id != ""
        if isinstance(happened, events.Damaged | events.Repaired):
            swapped.add(state.active_id)  # The runtime names only students that it has verified.
        assert state.active_id == "" or state.active_id in swapped
        assert not (state.refused_id and state.refused_id == state.active_id and before.active_id != state.active_id)
        changing = events.Swapped | events.Damaged | events.Repaired | events.Failed
        assert state.active_id == before.active_id or isinstance(happened, changing)
        assert state.uploaded_round < max(1, state.most_rounds + 1)
        if state.retry_at_s is None:
            # A restart always has a next step.
            _, due = step(state, events.Started(), now_s)
            assert len(due) == 1


@given(any_events)
def test_an_event_out_of_place_changes_nothing(event: events.Event) -> None:
    serving = State(phase=Phase.SERVE, active_id="mine", base_id="mine", link_up=True)
    state, actions = step(serving, event, 0.0)
    assert (state.phase, state.active_id, state.failure) == (Phase.SERVE, "mine", "")
    assert all(isinstance(action, events.Serve | events.Wait) for action in actions)
