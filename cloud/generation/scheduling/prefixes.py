"""PURE: which blocks of the KV cache hold which beginnings of prompts, so that requests that begin alike share them.

A tree per salt: each node is a full block, its edge the block's tokens. What a block holds depends on all tokens before
it, so a block is found by its whole path (Kwon et al. 2023, "PagedAttention", sec. 4.4; vLLM's prefix caching). Tokens
are compared themselves, not their hashes: no two prompts can be mistaken for each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

NOBODY: Final = -1


@dataclass(eq=False, slots=True)
class _Node:
    block: int
    tokens: tuple[int, ...]
    parent: "_Node | None" = None
    salt: str = ""
    children: dict[tuple[int, ...], "_Node"] = field(default_factory=dict)
    by_first: dict[int, dict[tuple[int, ...], "_Node"]] = field(default_factory=dict)
    """The children again, by their first token: of many continuations, few begin alike."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """Blocks that hold the first tokens of a prompt, and of one further block its first ``partial`` tokens."""

    blocks: tuple[int, ...] = ()
    further: int = NOBODY
    partial: int = 0


class Prefixes:
    """The blocks of ``block_tokens`` tokens that can be shared.

    >>> known = Prefixes(block_tokens=2)
    >>> known.add("", [1, 2, 3, 4], (10, 11))
    >>> known.find("", [1, 2, 3, 9])
    Beginning(blocks=(10,), further=11, partial=1)
    >>> known.find("another salt", [1, 2, 3, 4])
    Beginning(blocks=(), further=-1, partial=0)
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._roots: dict[str, _Node] = {}
        self._nodes: dict[int, _Node] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def find(self, salt: str, tokens: Sequence[int]) -> Beginning:
        """Returns the longest known beginning of ``tokens`` among the requests of the same salt."""
        node, blocks, at = self._roots.get(salt), [], 0
        if node is None:
            return Beginning()
        while len(tokens) - at >= self._block_tokens:
            child = node.children.get(tuple(tokens[at : at + self._block_tokens]))
            if child is None:
                break
            blocks.append(child.block)
            node, at = child, at + self._block_tokens
        rest = tuple(tokens[at : at + self._block_tokens])
        best, partial = NOBODY, 0
        for each in node.by_first.get(rest[0], {}).values() if rest else ():
            alike = _alike(each.tokens, rest)
            if alike > partial:
                best, partial = each.block, alike
        return Beginning(tuple(blocks), best, partial)

    def add(self, salt: str, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        """Makes the full ``blocks`` of ``tokens`` known. Where another block holds the same already, it stays."""
        node = self._roots.setdefault(salt, _Node(NOBODY, (), salt=salt))
        for at, block in enumerate(blocks):
            part = tuple(tokens[at * self._block_tokens : (at + 1) * self._block_tokens])
            child = node.children.get(part)
            if child is None:
                child = _Node(block, part, node, salt)
                self._nodes[block] = node.children[part] = child
                node.by_first.setdefault(part[0], {})[part] = child
            node = child

    def remove(self, block: int) -> list[int]:
        """Forgets a block and those that follow it, which no one can find any more. Returns them all."""
        node = self._nodes[block]
        assert node.parent is not None, "a root is no block"
        del node.parent.children[node.tokens]
        alike = node.parent.by_first[node.tokens[0]]
        del alike[node.tokens]
        if not alike:
            del node.parent.by_first[node.tokens[0]]
        if node.parent.block == NOBODY and not node.parent.children:
            del self._roots[node.salt]
        gone, rest = [], [node]
        while rest:
            each = rest.pop()
            gone.append(each.block)
            del self._nodes[each.block]
            rest += each.children.values()
        return gone


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the number of first tokens that both share."""
    count = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        count += 1
    return count
