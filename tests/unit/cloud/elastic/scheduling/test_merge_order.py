"""The order of merging: something new gets the default, and what is continued keeps its own."""

import pytest

from isthmus.cloud.elastic.scheduling.merge_order import MergeOrder, OtherOrder, order_for, order_in

OURS: MergeOrder = "receiving-first"
PAPERS: MergeOrder = "published"


def test_something_new_gets_the_published_order_or_the_one_that_is_asked_for() -> None:
    assert order_for(None, {}) == order_for(None, {"a": None, "b": None}) == PAPERS
    assert order_for(OURS, {"a": None}) == OURS


@pytest.mark.parametrize("order", [OURS, PAPERS])
def test_what_is_continued_keeps_its_order(order: MergeOrder) -> None:
    assert order_for(None, {"new": None, "old": order}) == order
    assert order_for(order, {"old": order}) == order


def test_orders_that_do_not_belong_together_are_refused_with_the_way_out() -> None:
    with pytest.raises(OtherOrder, match=r"--merge-order published: warm was made with the order receiving-first\. "):
        order_for(PAPERS, {"new": None, "warm": OURS})
    with pytest.raises(OtherOrder, match="a was made with tokens merged in the order published, and b in the order"):
        order_for(None, {"a": PAPERS, "b": OURS})


def test_a_file_without_an_order_was_made_with_the_only_one_there_was() -> None:
    assert order_in({}) == OURS
    assert order_in({"merge_order": PAPERS}) == PAPERS
    with pytest.raises(ValueError, match="merge_order must be one of published, receiving-first"):
        order_in({"merge_order": ["published"]})
