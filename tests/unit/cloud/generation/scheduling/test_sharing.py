"""Which tokens a second request computes, what stays when its owner has gone, and what makes room."""

from collections.abc import Sequence

from isthmus.cloud.generation.policies.by_name import make_policy
from isthmus.cloud.generation.scheduling.blocks import BlockTable, Shared
from isthmus.cloud.generation.scheduling.engine import Engine
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.scheduling.profile import reference_profile
from isthmus.cloud.generation.scheduling.request import Request
from isthmus.cloud.generation.scheduling.step import Drawn, Step

SYSTEM = list(range(100, 110))


def engine(prefix_blocks: int = 8, blocks: int = 16) -> Engine:
    limits = Limits(rows=4, blocks=blocks, block_tokens=4, prefix_blocks=prefix_blocks)
    return Engine(reference_profile(), make_policy("fused"), limits)


def ran(made: Engine, id: int, prompt: Sequence[int], *, salt: str = "") -> Step:
    """Serves a request of one token, and returns its step."""
    made.submit(Request(id, prompt, 1, arrival_s=0.0, salt=salt), 0.0)
    step = made.next_step(0.0).step
    assert step is not None
    made.finished(step, {id: Drawn(0)}, 0.0)
    return step


def test_the_second_request_computes_only_what_is_its_own() -> None:
    made = engine()
    first = ran(made, 0, [*SYSTEM, 1, 2, 3])
    assert (first.rows[0].first, len(first.rows[0].tokens), first.shared) == (0, 13, ())
    second = ran(made, 1, [*SYSTEM, 7, 8, 9])
    # Two whole blocks are shared, and two tokens of the third, which is copied since the others differ.
    assert (second.rows[0].first, list(second.rows[0].tokens)) == (10, [7, 8, 9])
    assert second.rows[0].blocks[:2] == first.rows[0].blocks[:2] and second.rows[0].blocks[2] != first.rows[0].blocks[2]
    assert second.shared == ((1, Shared(10, (first.rows[0].blocks[2], second.rows[0].blocks[2]))),)
    assert made.shared_tokens == 10 and made.free_blocks == 16


def test_the_same_prompt_leaves_its_last_token_to_draw_from() -> None:
    made = engine()
    ran(made, 0, SYSTEM[:8])
    again = ran(made, 1, SYSTEM[:8])
    assert (again.rows[0].first, list(again.rows[0].tokens)) == (7, [107])
    assert again.rows[0].draws and again.load.prompt_tokens + again.load.decode_rows == 1


def test_another_salt_shares_nothing() -> None:
    made = engine()
    ran(made, 0, SYSTEM)
    assert ran(made, 1, SYSTEM, salt="mine").rows[0].first == 0
    assert ran(made, 2, SYSTEM, salt="mine").rows[0].first == 8


def test_without_room_for_it_nothing_is_kept() -> None:
    made = engine(prefix_blocks=0)
    ran(made, 0, SYSTEM)
    assert ran(made, 1, SYSTEM).rows[0].first == 0 and made.kept_blocks == 0


def test_the_least_recently_used_makes_room_and_what_is_kept_is_bounded() -> None:
    made = engine(prefix_blocks=4, blocks=6)
    ran(made, 0, range(8))
    ran(made, 1, range(50, 58))
    assert made.kept_blocks == 4
    ran(made, 2, range(9))  # used again
    ran(made, 3, range(70, 78))
    assert made.kept_blocks == 4
    assert ran(made, 4, range(9)).rows[0].first == 8, "kept, since it was used last"
    assert ran(made, 5, range(50, 59)).rows[0].first == 0, "made room"
    assert ran(made, 6, range(200, 223)).rows[0].first == 0, "all six blocks are there for one that needs them"
    assert made.free_blocks == 6


def test_a_block_of_two_owners_is_free_when_both_have_gone() -> None:
    table = BlockTable(4, block_tokens=2, kept=1)
    assert table.grow(0, 4) == (0, 1)
    table.know(0, "", [5, 6, 7, 8])
    assert table.share(1, "", [5, 6, 9]) == Shared(2) and table.owned(1) == (0,)
    table.release(0)
    assert (table.free, table.kept) == (3, 1)
    table.release(1)
    assert (table.free, table.kept) == (4, 1), "the first block is kept, the second was dropped for it"
    assert table.share(2, "", [5, 6, 7]) == Shared(2)
