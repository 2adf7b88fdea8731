"""result.json, the sentence made from it, and gains over seeds with their standard errors."""

import math
from typing import Any

import pytest

from isthmus.demo.result import closing_sentence, gains


def _client(name: str, before: list[int], alone: list[int], taught: list[int], corrections: int = 8) -> dict[str, Any]:
    ways = {"before": before, "without_labels": alone, "with_corrections": taught}
    return {"name": name, "labels": [0] * len(before), **ways, "corrections": [{}] * corrections}


def test_the_sentence_counts_what_the_file_says() -> None:
    clients = [_client("1025", [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]), _client("b", [1, 0], [0, 0], [0, 0], 0)]
    assert closing_sentence({"clients": clients}) == (
        "No recording left a device: of 1025's 4 clips Isthmus understood 1 at first, 2 after it had learned from "
        "other clips without being told anything, and 3 after 8 corrections of these other clips (either gain may be "
        "chance); of b's 2 clips Isthmus understood 1 at first, 0 after it had learned from other clips without being "
        "told anything (the loss may be chance)."
    )


@pytest.mark.parametrize(
    ("alone", "taught", "corrections", "doubt"),
    [
        ([1] * 8, [1] * 8, 8, ""),
        ([0] * 8, [0] * 8, 8, ""),
        ([1] + [0] * 7, [1] * 8, 8, " (the gain without labels may be chance)"),
        ([1] * 8, [1] + [0] * 7, 8, " (the gain after corrections may be chance)"),
        ([1] + [0] * 7, [0] * 8, 0, " (the gain may be chance)"),
        ([1] + [0] * 7, [1, 1] + [0] * 6, 8, " (either gain may be chance)"),
    ],
)
def test_the_sentence_says_what_may_be_chance(
    alone: list[int], taught: list[int], corrections: int, doubt: str
) -> None:
    sentence = closing_sentence({"clients": [_client("a", [0] * 8, alone, taught, corrections)]})
    assert sentence.endswith(("these other clips" if corrections else "told anything") + doubt + ".")


def test_a_gain_and_a_loss_may_both_be_chance() -> None:
    client = _client("a", [1, 0, 0, 1], [1, 1, 0, 1], [1, 0, 0, 0])
    assert closing_sentence({"clients": [client]}).endswith(" (both changes may be chance).")


def test_a_gain_is_that_of_paired_clips_over_all_seeds() -> None:
    first = {"clients": [_client("a", [0] * 8 + [1] * 8, [1] * 16, [1] * 16)]}
    second = {"clients": [_client("b", [1] * 16, [1] * 12 + [0] * 4, [1] * 16)]}
    alone, taught = gains([first, second])
    assert (alone.client, alone.way, alone.clips, alone.before) == ("a, b", "without_labels", 32, 75.0)
    assert alone.points == pytest.approx(12.5)
    variance = (8 * 0.875**2 + 4 * 1.125**2 + 20 * 0.125**2) / 31
    assert alone.error == pytest.approx(100 * math.sqrt(variance / 32))
    assert not alone.beyond_chance
    assert taught.beyond_chance


def test_no_change_is_no_gain_and_results_that_do_not_fit_are_refused() -> None:
    same = {"clients": [_client("a", [1, 0], [1, 0], [1, 0])]}
    assert [gain.beyond_chance for gain in gains([same])] == [False, False]
    with pytest.raises(ValueError, match="equally many clients"):
        gains([same, {"clients": []}])
    with pytest.raises(ValueError, match="equally many clients"):
        gains([])
    with pytest.raises(ValueError, match="a has no test clips"):
        gains([{"clients": [_client("a", [], [], [])]}])
