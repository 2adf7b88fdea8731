"""Requests that begin alike share blocks: each reads its own prompt, whoever computed it, and no block is lost."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.cloud.generation.policies.by_name import make_policy
from isthmus.cloud.generation.scheduling.engine import Engine
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.scheduling.prefixes import Prefixes
from isthmus.cloud.generation.scheduling.profile import reference_profile
from isthmus.cloud.generation.scheduling.request import Outcome, Request
from isthmus.cloud.generation.scheduling.simulate import VirtualWorld, serve
from isthmus.cloud.generation.scheduling.step import Drawn, Ended, Step, Token

PROFILE = reference_profile()
BLOCK = 4


class Memory:
    """A KV cache that remembers, for each place, all tokens up to it: what its key and value depend on."""

    def __init__(self) -> None:
        self.places: dict[int, tuple[Any, ...]] = {}

    def run(self, step: Step) -> None:
        """Copies, checks that each row finds its own beginning, and writes the row's tokens."""
        for _, shared in step.shared:
            if shared.copy is not None:
                source, target = (BLOCK * block for block in shared.copy)
                for at in range(BLOCK):
                    self.places[target + at] = self.places.get(source + at, ())
        for row in step.rows:
            known: tuple[Any, ...] = (row.request.salt,)
            for position in range(row.first):
                found = self.places[BLOCK * row.blocks[position // BLOCK] + position % BLOCK]
                assert found[:-1] == known, "a row reads what belongs to another beginning"
                known = found
            assert [*known[1:]] == [*row.request.prompt, *answer(row.request, 200)][: row.first]
        for row in step.rows:
            for position, token in enumerate(row.tokens, row.first):
                at = BLOCK * row.blocks[position // BLOCK] + position % BLOCK
                before = (
                    self.places[BLOCK * row.blocks[(position - 1) // BLOCK] + (position - 1) % BLOCK]
                    if position
                    else (row.request.salt,)
                )
                self.places[at] = (*before, token)


def answer(request: Request, count: int) -> list[int]:
    """The tokens that any model would draw: they follow from the prompt alone."""
    seed = sum(request.prompt) + len(request.prompt)
    return [(seed + 7 * at) % 3 for at in range(count)]


@st.composite
def workloads(draw: st.DrawFn) -> tuple[list[Request], dict[int, int], Limits]:
    blocks = draw(st.integers(6, 24))
    limits = Limits(
        rows=draw(st.integers(1, 5)),
        blocks=blocks,
        block_tokens=BLOCK,
        step_tokens=draw(st.integers(4, 40)),
        prefix_blocks=draw(st.integers(1, blocks)),
    )
    systems = draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=3))
    requests, at_s = [], 0.0
    for id in range(draw(st.integers(2, 10))):
        at_s += draw(st.sampled_from([0.0, 0.05, 0.5]))
        own = draw(st.lists(st.integers(0, 1), min_size=0, max_size=8))
        prompt = (draw(st.sampled_from(systems)) + own)[: 4 * blocks - 3]
        most = draw(st.integers(1, min(12, 4 * blocks - len(prompt))))
        salt = draw(st.sampled_from(["", "", "mine"]))
        requests.append(Request(id, prompt, most, arrival_s=at_s, user=draw(st.sampled_from("ab")), salt=salt))
    return requests, {each.id: draw(st.integers(1, each.max_tokens)) for each in requests}, limits


@pytest.mark.parametrize("policy", ["fused", "srpt", "orca", "vtc", "paced", "jitserve"])
@settings(max_examples=40, deadline=None)
@given(made=workloads(), data=st.data())
def test_every_row_reads_its_own_beginning_and_no_block_is_lost(
    policy: str, made: tuple[list[Request], dict[int, int], Limits], data: st.DataObject
) -> None:
    requests, lengths, limits = made
    engine = Engine(PROFILE, make_policy(policy), limits)
    memory, coming, now_s, steps = Memory(), list(requests), 0.0, 0
    answers: dict[int, list[int]] = {each.id: [] for each in requests}
    outcomes: dict[int, Outcome] = {}
    while coming or engine.under_way:
        while coming and coming[0].arrival_s <= now_s:
            engine.submit(coming.pop(0), now_s)
        decision = engine.next_step(now_s)
        owned = {block for each in requests for block in engine.blocks_of(each.id)}
        assert len(owned) + engine.free_blocks == limits.blocks, "owned, kept and loose blocks are all"
        assert engine.kept_blocks <= limits.prefix_blocks
        if decision.step is None:
            assert coming or not engine.under_way, "everybody waits for ever"
            now_s = max(now_s, coming[0].arrival_s) if coming else now_s
            continue
        steps += 1
        assert steps < 2_000, "no progress"
        step = decision.step
        now_s += step.predicted_s
        left = data.draw(st.integers(0, 30))
        if left == 0:
            engine.cancel(data.draw(st.sampled_from(requests)).id, now_s)
        if left == 1:  # before anything was computed or copied
            outcomes |= {ended.life.id: ended.outcome for ended in engine.failed(step, now_s)}
            continue
        memory.run(step)
        drawn = {}
        for row in step.rows:
            if row.draws:
                index = row.first + len(row.tokens) - len(row.request.prompt)
                drawn[row.id] = Drawn(answer(row.request, index + 1)[index], last=index + 1 >= lengths[row.id])
        for event in engine.finished(step, drawn, now_s):
            if isinstance(event, Token):
                assert event.index == len(answers[event.life.id])
                answers[event.life.id].append(event.token)
            elif isinstance(event, Ended):
                outcomes[event.life.id] = event.outcome
    for request in requests:
        if outcomes.get(request.id) is Outcome.FINISHED:
            assert answers[request.id] == answer(request, lengths[request.id])
    assert engine.free_blocks == limits.blocks


@settings(max_examples=30, deadline=None)
@given(made=workloads())
def test_sharing_changes_no_answer(made: tuple[list[Request], dict[int, int], Limits]) -> None:
    requests, lengths, limits = made
    runs = {}
    for prefix_blocks in (0, limits.prefix_blocks):
        engine = Engine(PROFILE, make_policy("fused"), replace(limits, prefix_blocks=prefix_blocks), adapts=False)
        runs[prefix_blocks] = serve(engine, requests, VirtualWorld(PROFILE, [lengths[each.id] for each in requests]))
    alone, shared = (
        {end.life.id: len(end.life.tokens) for end in runs[each].ends} for each in (0, limits.prefix_blocks)
    )
    assert alone == shared == lengths


@settings(max_examples=100)
@given(steps=st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=9), st.booleans()), max_size=20))
def test_what_is_known_is_found_and_what_was_removed_is_not(steps: list[tuple[list[int], bool]]) -> None:
    """Against a list of all known paths, searched one by one."""
    known, paths, next_block = Prefixes(2), {}, 0
    for tokens, adds in steps:
        path = tuple(tokens[: len(tokens) // 2 * 2])
        if adds:
            blocks = list(range(next_block, next_block + len(path) // 2))
            next_block += len(blocks)
            known.add("", path, blocks)
            for at, block in enumerate(blocks, 1):
                paths.setdefault(path[: 2 * at], block)
        elif paths:
            gone = known.remove(paths[min(paths)])
            first = min(paths)
            assert sorted(gone) == sorted(block for each, block in paths.items() if each[: len(first)] == first)
            paths = {each: block for each, block in paths.items() if each[: len(first)] != first}
        assert len(known) == len(paths)
        found = known.find("", tokens)
        whole = max((at for at in range(0, len(tokens) + 1, 2) if at == 0 or tuple(tokens[:at]) in paths), default=0)
        assert found.blocks == tuple(paths[tuple(tokens[:at])] for at in range(2, whole + 1, 2))
        best = max(
            (
                alike(each[whole:], tokens[whole:])
                for each in paths
                if len(each) == whole + 2 and each[:whole] == tuple(tokens[:whole])
            ),
            default=0,
        )
        assert found.partial == best
        assert known.find("other", tokens).blocks == ()


def alike(a: Any, b: Any) -> int:
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return count
