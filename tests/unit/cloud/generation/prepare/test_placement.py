"""The search of a placement: it finds the rate at which goals are just kept, and tells apart when roles pay."""

import numpy as np

from isthmus.cloud.generation.prepare.placement import Goals, Placement, best_rate, placements, share_in_time
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.scheduling.profile import reference_profile
from isthmus.cloud.generation.scheduling.workload import Sizes, chat_sizes

PROFILE, LIMITS = reference_profile(), Limits()
FUSED, APART = Placement(0, 2), Placement(1, 1)


def code_sizes(count: int) -> Sizes:
    """Long prompts and short answers, as the Azure code trace has them after its prompts were divided by 8."""
    rng = np.random.default_rng(0)
    prompts_N = np.clip(rng.lognormal(5.2, 0.8, count), 8, 1_000).astype(np.int64)
    answers_N = np.clip(rng.lognormal(2.6, 1.0, count), 1, 300).astype(np.int64)
    return Sizes(prompts_N, answers_N, ["code"] * count)


def test_the_rate_keeps_the_goals_and_a_higher_one_does_not() -> None:
    sizes, goals = chat_sizes(np.random.default_rng(0), 60), Goals(1.0, 0.05)
    rate = best_rate(FUSED, sizes, goals, PROFILE, LIMITS)
    assert share_in_time(FUSED, sizes, rate, goals, PROFILE, LIMITS) >= 0.9
    assert share_in_time(FUSED, sizes, 2 * rate, goals, PROFILE, LIMITS) < 0.9
    assert best_rate(FUSED, sizes, Goals(1.0, 0.001), PROFILE, LIMITS) == 0.0


def test_fused_replicas_win_on_conversations_and_divided_ones_on_code_with_tight_gaps() -> None:
    chat = chat_sizes(np.random.default_rng(0), 60)
    assert best_rate(FUSED, chat, Goals(1.0, 0.1), PROFILE, LIMITS) > best_rate(
        APART, chat, Goals(1.0, 0.1), PROFILE, LIMITS
    )
    code, tight = code_sizes(80), Goals(1.0, 0.06)
    assert best_rate(APART, code, tight, PROFILE, LIMITS) > best_rate(FUSED, code, tight, PROFILE, LIMITS)


def test_all_placements_are_searched() -> None:
    assert [(each.prefill, each.decode) for each in placements(4, chunks=[64, 128])] == [
        (0, 4), (0, 4), (1, 3), (2, 2), (3, 1),
    ]  # fmt: skip
