"""PURE: the order in which a layer hands merged tokens on (model/merging.py), and which order a command merges in.

Models, profiles and searches of different orders do not belong together. So whatever continues earlier work keeps the
order of that work, and only something new gets the default.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal

MergeOrder = Literal["published", "receiving-first"]
MERGE_ORDERS: Final[tuple[MergeOrder, ...]] = ("published", "receiving-first")
DEFAULT_ORDER: Final[MergeOrder] = "published"
"""The order of something new. If an odd number of tokens is merged per layer, it was up to a point more accurate than
the other one; otherwise both are alike (docs/results/merge-order_2026-11-30.md)."""
ORDER_OF_OLD_FILES: Final[MergeOrder] = "receiving-first"
"""The only order that existed before files named one."""


class OtherOrder(ValueError):
    """Two orders of merging meet that do not belong together."""


def order_in(raw: Mapping[str, Any]) -> MergeOrder:
    """Returns the ``merge_order`` of a file's content. Raises ValueError for one that does not exist."""
    order: MergeOrder = raw.get("merge_order", ORDER_OF_OLD_FILES)
    if order not in MERGE_ORDERS:
        raise ValueError(f"merge_order must be one of {', '.join(MERGE_ORDERS)}")
    return order


def order_for(asked: MergeOrder | None, continued: Mapping[str, MergeOrder | None]) -> MergeOrder:
    """Returns the order to merge in: the one asked for, else that of what is continued, else the default.

    ``continued`` holds the order of each file or folder that is used further; None if it does not exist yet.
    Raises OtherOrder if they differ from each other or from the order that is asked for.

    >>> order_for(None, {"schedules.json": None})
    'published'
    >>> order_for(None, {"schedules.json": "receiving-first"})
    'receiving-first'
    """
    known = {name: order for name, order in continued.items() if order is not None}
    first = next(iter(known), None)
    for name, order in known.items():
        if asked is not None and order != asked:
            raise OtherOrder(
                f"--merge-order {asked}: {name} was made with the order {order}. Leave the option out to go on with "
                "that, or name another file or folder to begin anew"
            )
        assert first is not None
        if order != known[first]:
            raise OtherOrder(
                f"{first} was made with tokens merged in the order {known[first]}, and {name} in the order {order}: "
                "make one of them anew with the other's --merge-order"
            )
    return asked or (DEFAULT_ORDER if first is None else known[first])
