"""For any events in any order: no unverified or refused student is swapped in, and the agent always has a next step."""

from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.edge.agent import behaviour
from isthmus.edge.agent.behaviour import Phase, Purpose, State, step
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
events = st.one_of(
    st.just(behaviour.Started()),
    st.just(behaviour.Enrolled()),
    st.just(behaviour.Tick()),
    st.just(behaviour.Answered()),
    st.builds(behaviour.Fetched, ids),
    st.builds(behaviour.Verified, ids),
    st.builds(behaviour.Judged, ids, st.booleans(), st.just("why")),
    st.builds(behaviour.Swapped, ids),
    st.builds(behaviour.Damaged, ids, ids),
    st.builds(behaviour.Repaired, ids),
    st.builds(behaviour.Encoded, rounds),
    st.builds(behaviour.Accepted, rounds, statuses),
    st.builds(behaviour.JobChanged, statuses),
    st.builds(behaviour.WatchEnded, jitters),
    st.builds(behaviour.Failed, failures, jitters),
)


def fitting(action: behaviour.Action, status: JobStatus, accept: bool = True) -> behaviour.Event:
    """The event that reports success of ``action``, so that random runs get far."""
    match action:
        case behaviour.Enrol():
            return behaviour.Enrolled()
        case behaviour.Fetch(student_id):
            return behaviour.Fetched(student_id or "base")
        case behaviour.Verify(student_id):
            return behaviour.Verified(student_id)
        case behaviour.Judge(_, new_id):
            return behaviour.Judged(new_id, accept, "why")
        case behaviour.Swap(student_id):
            return behaviour.Swapped(student_id)
        case behaviour.MakePrototypes(_, round):
            return behaviour.Encoded(round)
        case behaviour.Upload(_, round):
            return behaviour.Accepted(round, JobStatus("job", Stage.QUEUED))
        case behaviour.Watch():
            return behaviour.JobChanged(status)
        case behaviour.Repair(student_id):
            return behaviour.Repaired(student_id)
        case behaviour.Wait() | behaviour.Serve():
            return behaviour.Tick()


@settings(max_examples=150)
@given(st.lists(st.tuples(st.booleans(), events, statuses, st.floats(0, 100), st.booleans()), max_size=60))
def test_random_lives(moments: list[tuple[bool, behaviour.Event, JobStatus, float, bool]]) -> None:
    state, now_s = State(), 0.0
    last: behaviour.Action = behaviour.Enrol()
    fetched_since_verified: dict[str, bool] = {}
    swapped: set[str] = set()
    accepted: dict[str, bool] = {}
    for random_event, event, status, elapsed_s, accept in moments:
        now_s += elapsed_s
        happened = event if random_event else fitting(last, status, accept)
        before = state
        state, actions = step(state, happened, now_s)
        if isinstance(happened, behaviour.Verified) and before.phase is Phase.VERIFY:
            fetched_since_verified[happened.student_id] = True
        if isinstance(happened, behaviour.Fetched) and before.phase is Phase.FETCH:
            fetched_since_verified[happened.student_id] = False
            accepted.pop(happened.student_id, None)
        if isinstance(happened, behaviour.Judged) and before.phase is Phase.JUDGE:
            accepted[happened.student_id] = happened.accept
        for action in actions:
            last = action
            if isinstance(action, behaviour.Swap):
                assert fetched_since_verified.get(action.student_id) is True
                assert action.student_id
                assert state.purpose is Purpose.BASE or accepted.get(action.student_id) is True
                swapped.add(action.student_id)
            if isinstance(action, behaviour.Wait):
                assert now_s < action.until_s <= now_s + behaviour.TROUBLE_MOST_S or isinstance(
                    happened, behaviour.Tick
                )
            if isinstance(action, behaviour.Judge):
                assert action.old_id == state.active_id != ""
        if isinstance(happened, behaviour.Damaged | behaviour.Repaired):
            swapped.add(state.active_id)  # The runtime names only students that it has verified.
        assert state.active_id == "" or state.active_id in swapped
        assert not (state.refused_id and state.refused_id == state.active_id and before.active_id != state.active_id)
        changing = behaviour.Swapped | behaviour.Damaged | behaviour.Repaired | behaviour.Failed
        assert state.active_id == before.active_id or isinstance(happened, changing)
        assert state.uploaded_round < max(1, state.most_rounds + 1)
        if state.retry_at_s is None:
            # A restart always has a next step.
            _, due = step(state, behaviour.Started(), now_s)
            assert len(due) == 1


@given(events)
def test_an_event_out_of_place_changes_nothing(event: behaviour.Event) -> None:
    serving = State(phase=Phase.SERVE, active_id="mine", base_id="mine", link_up=True)
    state, actions = step(serving, event, 0.0)
    assert (state.phase, state.active_id, state.failure) == (Phase.SERVE, "mine", "")
    assert all(isinstance(action, behaviour.Serve | behaviour.Wait) for action in actions)
