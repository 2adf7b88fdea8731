"""Paired differences, their noise, the knee, and the tables of them."""

import dataclasses
import math

import numpy as np
import pytest

from isthmus.experiments.personal.findings import tables
from isthmus.experiments.personal.findings.knee import knee
from isthmus.experiments.personal.findings.paired import by_group, difference, spread
from tests.rigs.distill.cells import SIZES, cell


def test_a_difference_is_paired_and_says_how_many_pairs_would_tell() -> None:
    ours = {"a": 0.72, "b": 0.70, "c": 0.75, "alone": 0.0}
    theirs = {"a": 0.70, "b": 0.71, "c": 0.70}
    found = difference(ours, theirs)
    deltas = np.array([0.02, -0.01, 0.05])
    assert found.pairs == 3
    assert found.mean == pytest.approx(deltas.mean())
    assert found.standard_error == pytest.approx(deltas.std(ddof=1) / math.sqrt(3))
    assert (found.better, found.worse) == (2, 1)
    assert found.needed == math.ceil(((1.959964 + 0.841621) * deltas.std(ddof=1) / deltas.mean()) ** 2)
    assert not found.beyond_noise
    sure = difference({i: 0.1 + 0.001 * (i % 2) for i in range(8)}, dict.fromkeys(range(8), 0.0))
    assert sure.beyond_noise and sure.needed == 2
    with pytest.raises(ValueError, match="no unit"):
        difference({"a": 1.0}, {"b": 1.0})


def test_seeds_of_one_person_are_no_independent_people() -> None:
    assert by_group({("a", 0): 0.2, ("a", 1): 0.4, ("b", 0): 1.0}) == pytest.approx({"a": 0.3, "b": 1.0})
    assert spread([0.5]).deviation == 0
    with pytest.raises(ValueError, match="no values"):
        spread([])


def test_both_heads_are_read_and_people_are_the_units() -> None:
    cells = [
        cell(client, method, seed, plain, teacher_head=taught)
        for client, shift in (("a", 0.0), ("b", 0.2))
        for seed in (0, 1)
        for method, plain, taught in (("all", 0.5 + shift, 0.4), ("cluster", 0.4 + shift, 0.5))
    ]
    made = tables.both_heads(cells, ("all",), "Both")
    assert made.rows[1] == ("cluster", "50.0", "**-10.0 ± 0.0**", "50.0", "**+10.0 ± 0.0**")
    assert made.rows[2] == ("(the teacher itself)", "", "", "60.0", "")
    assert made.note.startswith("2 clients")


@pytest.mark.parametrize(("own", "taught", "holds"), [(0.4, 0.5, True), (0.7, 0.5, False), (0.5, 0.7, False)])
def test_a_teacher_that_is_not_above_its_student_is_said_to_fail_the_premise(
    own: float, taught: float, holds: bool
) -> None:
    cells = [cell(client, "all", seed, own, teacher_head=taught) for client in "ab" for seed in (0, 1)]
    made = tables.premise(cells, "Premise")
    shares = (f"{100 * each:.1f}" for each in (0.6, taught, own))
    assert made.rows[0] == ("a", *shares, *(f"{60 - 100 * each:+.1f}" for each in (taught, own)))
    assert ("the premise of distillation holds" in made.note) == holds
    assert ("**the premise of distillation is not shown here**" in made.note) != holds


def test_distillation_is_compared_before_and_after_the_offset() -> None:
    cells = [
        cell(client, method, seed, 0.5, teacher_head=0.4 + more, offset_before=0.6, offset=0.6 + more)
        for client, more in (("a", 0.1), ("b", 0.2))
        for seed in (0, 1)
        for method in ("all", "cluster")
    ]
    made = tables.with_offset(cells, "Offset")
    assert made.rows[1] == ("cluster", "55.0", "75.0", "**+20.0 ± 0.0**", "**+15.0 ± 5.0**")
    assert made.note.startswith("2 people")


def test_the_knee_is_the_fewest_bytes_that_lose_nothing_beyond_noise() -> None:
    cells = [cell("a", "cluster", seed, 0.7 + 0.01 * seed) for seed in range(4)]
    assert knee(cells, SIZES) == ("1", "int8")  # 20 bytes lose 20 points, 40 bytes nothing
    free = [dataclasses.replace(each, accuracy={r: dict.fromkeys(SIZES, 0.7) for r in ("1", "2")}) for each in cells]
    assert knee(free, SIZES) == ("2", "int8")
    with pytest.raises(ValueError, match="no cells"):
        knee([], SIZES)


def test_no_knee_behind_a_milder_setting_that_loses() -> None:
    """Ratio 2 loses more than noise; ratio 3 by chance does not, which does not justify sending less than ratio 1."""
    sizes = {"fp32": {"1": 80, "2": 40, "3": 27}, "int8": {"1": 20, "2": 10, "3": 7}}
    shares = {"1": 0.7, "2": 0.5, "3": 0.7}
    cells = [
        dataclasses.replace(
            cell("a", "cluster", seed, 0.7), accuracy={ratio: dict.fromkeys(sizes, shares[ratio]) for ratio in shares}
        )
        for seed in range(4)
    ]
    assert knee(cells, sizes) == ("1", "int8")


def test_tables_compare_the_same_client_and_seed() -> None:
    cells = [cell("a", "all", s, 0.5) for s in range(3)] + [cell("a", "cluster", s, 0.6 + 0.01 * s) for s in range(3)]
    first = tables.accuracy_by_method(cells, "sensitive", "t")
    assert first.header == ("method", "a (20 clips)")
    assert first.rows[0] == ("all", "50.0 ± 0.0")
    assert first.rows[-1][1] == "60.0 ± 0.0"  # the teacher, counted once per seed
    paired = tables.differences(cells, "sensitive", ("all",), "t")
    assert paired.rows[1][:3] == ("cluster", "**+11.0 ± 0.6**", "3 / 0")
    people = tables.by_person(cells, "all", ("all", "cluster"), "t")
    assert people.rows[0] == ("a", "20", "50.0", "61.0")
    assert people.rows[-2][0] == "less all"
    assert people.rows[-1] == ("worse than all by over 2 points", "", "", "0 of 1")
    assert "| all |" in first.markdown()
    assert tables.cost(cells, "t").rows[0][1] == "30"
    assert tables.by_compression(cells, "cluster", SIZES, "t").rows[0][:3] == ("fp32", "1", "100")


def test_differences_that_cancel_need_no_number_of_pairs() -> None:
    ours, theirs = {1: 0.1, 2: 0.2, 3: 0.0}, {1: 0.0, 2: 0.0, 3: 0.3}
    found = difference(ours, theirs)
    assert found.mean != 0 and abs(found.mean) < 1e-15  # 0.1 + 0.2 is not 0.3
    assert found.needed is None
