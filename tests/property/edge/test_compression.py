"""A better link never gives a more compressed setting; a choice is kept while the link does not change."""

from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge.link.compression import LinkEstimate, Setting, choose, make_policy, predicted_s
from isthmus.proto.messages import NumberType

POLICY = make_policy(512, (1.0, 1.5, 2.0, 3.0), tuple(NumberType), latency_budget_s=0.1)
throughputs = st.floats(1e2, 1e8)
seconds = st.floats(0, 0.2)
currents = st.sampled_from([None, *POLICY.settings])


def size(setting: Setting | None) -> int:
    """A local answer counts as the most compressed of all."""
    return 0 if setting is None else setting.frame_bytes


@given(throughputs, seconds, seconds, throughputs, seconds, seconds, currents)
def test_monotone(
    throughput: float,
    round_trip: float,
    server: float,
    more: float,
    less: float,
    faster: float,
    current: Setting | None,
) -> None:
    worse = LinkEstimate(throughput, round_trip, server)
    better = LinkEstimate(max(throughput, more), min(round_trip, less), min(server, faster))
    assert size(choose(POLICY, better, current, link_up=True)) >= size(choose(POLICY, worse, current, link_up=True))


@given(throughputs, seconds, currents)
def test_a_choice_meets_the_budget_and_is_stable(throughput: float, round_trip: float, current: Setting | None) -> None:
    estimate = LinkEstimate(throughput, round_trip)
    chosen = choose(POLICY, estimate, current, link_up=True)
    if chosen is not None:
        assert predicted_s(estimate, chosen) <= POLICY.latency_budget_s
        assert size(choose(POLICY, estimate, chosen, link_up=True)) == size(chosen)
