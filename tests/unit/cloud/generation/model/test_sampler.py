"""What is drawn, and that it depends on seed and position alone."""

import numpy as np
import pytest

from isthmus.cloud.generation.model.sampler import draw, uniform
from isthmus.cloud.generation.scheduling.request import Sampling
from isthmus.proto.errors import InvalidInput

LOGITS_V = np.log(np.array([0.1, 0.2, 0.4, 0.3], np.float32))


def drawn(sampling: Sampling, count: int = 1_500) -> np.ndarray:
    tokens = [draw(LOGITS_V, sampling, position) for position in range(count)]
    return np.bincount(tokens, minlength=4) / count


def test_shares_follow_the_probabilities() -> None:
    np.testing.assert_allclose(drawn(Sampling(seed=5)), [0.1, 0.2, 0.4, 0.3], atol=0.05)
    np.testing.assert_allclose(drawn(Sampling(seed=5, temperature=0.5)), np.array([1, 4, 16, 9]) / 30, atol=0.05)


def test_top_p_leaves_the_least_likely_out() -> None:
    np.testing.assert_allclose(drawn(Sampling(seed=5, top_p=0.65)), [0, 0, 4 / 7, 3 / 7], atol=0.05)
    assert drawn(Sampling(seed=5, top_p=1e-6))[2] == 1


def test_a_wide_nucleus_is_looked_for_in_the_whole_vocabulary() -> None:
    flat_V = np.zeros(1_000, np.float32)
    tokens = {draw(flat_V, Sampling(top_p=0.9), position) for position in range(1_500)}
    assert max(tokens) < 900 and len(tokens) > 600


def test_the_draw_depends_on_seed_and_position_alone() -> None:
    assert uniform(3, 7) == uniform(3, 7)
    assert len({uniform(seed, position) for seed in (0, -1, 1 << 63) for position in range(3)}) == 9
    assert draw(LOGITS_V, Sampling(temperature=0.0, seed=1), 0) == 2


def test_logits_that_are_not_finite_fail_the_step() -> None:
    with pytest.raises(ValueError, match="not finite"):
        draw(np.array([0.0, np.nan], np.float32), Sampling(), 0)


@pytest.mark.parametrize(
    "values", [{"temperature": float("nan")}, {"temperature": 2.1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_impossible_sampling_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(values))):
        Sampling(**values)
