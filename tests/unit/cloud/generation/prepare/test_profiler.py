"""The five costs are found again in steps that were made of them, and a real tiny model can be measured."""

import itertools
from pathlib import Path

import pytest

from isthmus.cloud.generation.model.weights import load_llama
from isthmus.cloud.generation.prepare import profiler
from isthmus.cloud.generation.scheduling.profile import GenerationProfile, Load, reference_profile
from tests.rigs.generation.llama import save_tiny_llama


def test_the_costs_that_made_the_times_are_found() -> None:
    known = reference_profile()
    kinds = profiler._kinds(profiler.ROWS, profiler.CONTEXTS, profiler.CHUNKS)
    loads = [Load.of(kind) for kind in kinds]
    costs, error = profiler.fit(loads, [known.step_s(load) for load in loads])
    wanted = (known.step_fixed_s, known.row_s, known.context_s, known.prompt_s, known.pair_s)
    assert costs == pytest.approx(wanted, rel=1e-3)
    assert error < 1e-6


def test_costs_are_never_negative_and_a_bad_fit_says_so() -> None:
    loads = [Load(decode_rows=rows, context_tokens=10 * rows) for rows in (1, 2, 4, 8)]
    costs, error = profiler.fit(loads, [0.4, 0.1, 0.4, 0.1])
    assert min(costs) >= 0
    assert error > profiler.GOOD_ERROR


def test_a_model_is_measured_with_every_layout(tmp_path: Path) -> None:
    config = save_tiny_llama(tmp_path)
    model = load_llama(tmp_path, config)
    ticks = itertools.count()
    seen: list[tuple[int, int]] = []
    for layout in ("slots", "paged", "padded"):
        found = profiler.measure(
            model,
            layout=layout,
            rows=(1, 3),
            contexts=(8, 16),
            chunks=(4, 8),
            repeats=1,
            clock=lambda: 0.01 * next(ticks),
            on_step=lambda done, every: seen.append((done, every)),
        )
        assert found.kv_bytes_per_token == 2 * 3 * 2 * 4 * 4
        assert all(each[-1] == pytest.approx(0.01) for each in found.grid)
        assert GenerationProfile.from_json(found.to_json()) == found
    assert seen[-1][0] == seen[-1][1]


def test_a_context_that_is_too_short_to_measure_is_refused(tmp_path: Path) -> None:
    config = save_tiny_llama(tmp_path, max_position_embeddings=8)
    with pytest.raises(ValueError, match="too short"):
        profiler.measure(load_llama(tmp_path, config), repeats=1)
