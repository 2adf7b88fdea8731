"""PURE: answers that are given again, to the same question or to one that means the same. Only named classes are kept.

The exact question comes first, then the nearest one by cosine within (class, user's state, model, settings), and within
a user for personal classes. Each class has a threshold, a lifetime and a quota of its own. After "category-aware
semantic caching" (Wang et al. 2025): a search pays only if

    h (T_model - t_hit) > t_search

with h the class's rate of hits so far. Under load a threshold falls towards the class's floor.

Where we differ: a guard refuses neighbours that negate, turn round or count something else. Sentences about "ascending"
and "descending" are closer to each other than most paraphrases are, so no threshold tells them apart.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Float32s = npt.NDArray[np.float32]

TRIALS: Final = 50
"""Searches of a class before its rate of hits is trusted."""
FORGET: Final = 0.98
_WORD: Final = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+(?:[.,]\d+)*")
_NEGATIONS: Final = """no not never none nobody nothing neither nor without cannot unless except"""
_OPPOSITES: Final = """
    ascending/descending on/off up/down increase/decrease increasing/decreasing enable/disable enabled/disabled
    open/close opened/closed start/stop add/remove add/subtract insert/delete create/delete create/destroy
    first/last before/after earliest/latest oldest/newest largest/smallest biggest/smallest highest/lowest
    maximum/minimum max/min most/least more/less more/fewer above/below over/under left/right top/bottom
    buy/sell lend/borrow import/export encode/decode encrypt/decrypt compress/decompress push/pull
    login/logout upload/download send/receive connect/disconnect install/uninstall show/hide lock/unlock
    true/false yes/no hot/cold warm/cold fast/slow long/short tall/short high/low old/new old/young rich/poor
    big/small heavy/light dark/light day/night morning/evening summer/winter north/south east/west
    male/female man/woman boy/girl he/she his/her husband/wife father/mother son/daughter
    win/lose pass/fail accept/reject accept/refuse allow/forbid allow/deny love/hate like/dislike
    good/bad better/worse best/worst safe/dangerous legal/illegal possible/impossible public/private
    positive/negative even/odd inside/outside indoor/outdoor arrive/depart arrival/departure
    into/out with/without multiply/divide plus/minus raise/lower gain/lose
"""


def _words(text: str) -> list[str]:
    return text.split()


_NO: Final = frozenset(_words(_NEGATIONS))
_PAIRS: Final = tuple(frozenset(pair.split("/")) for pair in _words(_OPPOSITES))


@dataclass(frozen=True, slots=True)
class CacheRule:
    """How answers of one class are kept. ``shared``: users may get each other's. Raises ValueError if out of range.

    ``floor``: what the threshold falls to under load; None: it does not fall.
    """

    threshold: float = 0.96
    floor: float | None = None
    lifetime_s: float = 3_600.0
    quota: int = 1_000
    shared: bool = False

    def __post_init__(self) -> None:
        if not 0.5 <= self.least <= self.threshold <= 1:
            raise ValueError("threshold and floor must be from 0.5 to 1, and the floor not above the threshold")
        if not 0 < self.lifetime_s <= 30 * 86_400 or not 1 <= self.quota <= 100_000:
            raise ValueError("lifetime_s must be at most 30 days, and quota from 1 to 100,000")

    @staticmethod
    def read(raw: Any) -> "dict[str, CacheRule]":
        """Reads rules by class from JSON values. Raises ValueError."""
        if not isinstance(raw, dict) or len(raw) > 256:
            raise ValueError("rules of a cache are an object of at most 256 classes")
        found = {}
        for kind, fields in raw.items():
            if not isinstance(fields, dict) or fields.keys() - CacheRule.__dataclass_fields__.keys():
                raise ValueError(f"class {kind[:64]!r}: known are {', '.join(CacheRule.__dataclass_fields__)}")
            try:
                found[kind] = CacheRule(**fields)
            except (TypeError, ValueError) as error:
                raise ValueError(f"class {kind[:64]!r}: {error}") from error
        return found

    @property
    def least(self) -> float:
        """The lowest threshold."""
        return self.threshold if self.floor is None else self.floor

    def threshold_at(self, pressure: float) -> float:
        """Returns the threshold under ``pressure``, from 0 (nobody waits) to 1."""
        return self.threshold - min(1.0, max(0.0, pressure)) * (self.threshold - self.least)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked. ``scope`` holds all else that an answer depends on: state, model, settings, earlier turns."""

    kind: str
    user: str
    scope: tuple[str, ...]
    text: str

    @property
    def plain(self) -> str:
        """The text without what makes no difference: case, spaces, and punctuation at the end."""
        return " ".join(self.text.casefold().split()).rstrip(" .!?")


@dataclass(slots=True)
class _Kept:
    question: Question
    answer: Any
    vector_D: Float32s | None
    until_s: float


@dataclass(slots=True)
class _Tally:
    """What is known of a class: searches and hits, both forgotten slowly, and the mean times that decide."""

    searches: float = 0.0
    hits: float = 0.0
    seen: int = 0
    search_s: float = 0.0
    model_s: float = 0.0

    def pays(self, hit_s: float) -> bool:
        if self.seen < TRIALS or not self.model_s:
            return True
        return self.hits / self.searches * (self.model_s - hit_s) > self.search_s


@dataclass
class AnswerCache:
    """Answers by class. Nothing is kept of a class without a rule. ``hit_s``: what it costs to give a kept answer.

    >>> cache = AnswerCache({"faq": CacheRule(shared=True)})
    >>> cache.add(Question("faq", "ada", (), "What is 2 + 2?"), "4", now_s=0.0)
    >>> cache.exact(Question("faq", "bob", (), " what is 2 + 2"), now_s=1.0)
    '4'
    """

    rules: Mapping[str, CacheRule]
    hit_s: float = 0.001
    _kept: dict[str, OrderedDict[tuple[Any, ...], _Kept]] = field(default_factory=dict)
    _tallies: dict[str, _Tally] = field(default_factory=dict)

    def serves(self, question: Question) -> bool:
        """Whether answers to such questions are kept at all."""
        return question.kind in self.rules

    def exact(self, question: Question, now_s: float) -> Any | None:
        """Returns the answer to the same question; None if there is none that is young enough."""
        kept = self._kept.get(question.kind, OrderedDict()).get(self.key(question))
        if kept is None or kept.until_s <= now_s:
            return None
        return kept.answer

    def searches(self, question: Question) -> bool:
        """Whether a search for a question that means the same is expected to pay."""
        if question.kind not in self.rules:
            return False
        return bool(self._kept.get(question.kind)) and self._tally(question.kind).pays(self.hit_s)

    def nearest(self, question: Question, vector_D: Float32s, now_s: float, pressure: float = 0.0) -> Any | None:
        """Returns the answer to the nearest question that the guard lets through; ``vector_D`` has length 1."""
        rule, tally = self.rules[question.kind], self._tally(question.kind)
        near = [
            kept
            for kept in self._kept.get(question.kind, OrderedDict()).values()
            if kept.vector_D is not None
            and kept.until_s > now_s
            and kept.question.scope == question.scope
            and (rule.shared or kept.question.user == question.user)
        ]
        tally.searches, tally.hits = FORGET * tally.searches + 1, FORGET * tally.hits
        tally.seen += 1
        if not near:
            return None
        cosines_N = np.stack([kept.vector_D for kept in near if kept.vector_D is not None]) @ vector_D
        for at in np.argsort(-cosines_N, kind="stable")[:4].tolist():
            if cosines_N[at] < rule.threshold_at(pressure):
                break
            if alike(near[at].question.text, question.text):
                tally.hits += 1
                return near[at].answer
        return None

    def add(self, question: Question, answer: Any, now_s: float, vector_D: Float32s | None = None) -> None:
        """Keeps an answer. If its class is at its quota, the oldest one goes."""
        rule = self.rules[question.kind]
        kept = self._kept.setdefault(question.kind, OrderedDict())
        key = self.key(question)
        kept.pop(key, None)
        while kept and (len(kept) >= rule.quota or next(iter(kept.values())).until_s <= now_s):
            kept.popitem(last=False)
        kept[key] = _Kept(question, answer, vector_D, now_s + rule.lifetime_s)

    def took(self, kind: str, *, search_s: float | None = None, model_s: float | None = None) -> None:
        """Notes how long a search or an answer of the model took; the break-even follows."""
        tally = self._tally(kind)
        if search_s is not None:
            tally.search_s = search_s if not tally.search_s else 0.9 * tally.search_s + 0.1 * search_s
        if model_s is not None:
            tally.model_s = model_s if not tally.model_s else 0.9 * tally.model_s + 0.1 * model_s

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    def _tally(self, kind: str) -> _Tally:
        return self._tallies.setdefault(kind, _Tally())

    def key(self, question: Question) -> tuple[Any, ...]:
        """Returns what the same question has in common: if the class is shared, for all users."""
        user = "" if self.rules.get(question.kind, CacheRule()).shared else question.user
        return (user, question.scope, question.plain)


def alike(first: str, second: str) -> bool:
    """Whether two texts may mean the same, as far as negations, opposites and numbers tell.

    >>> alike("Sort the list ascending", "Sort the list descending"), alike("Take 2 pills", "Take 3 pills")
    (False, False)
    >>> alike("How do I reset my password?", "I want to reset my password")
    True
    """
    words = [_WORD.findall(text.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")) for text in (first, second)]
    numbers = [sorted(word for word in each if word[0].isdigit()) for each in words]
    if numbers[0] != numbers[1]:
        return False
    sets = [frozenset(each) for each in words]
    negations = [sum(word in _NO or word.endswith("n't") for word in each) % 2 for each in words]
    if negations[0] != negations[1]:
        return False
    only = (sets[0] - sets[1], sets[1] - sets[0])
    for pair in _PAIRS:
        sides = [pair & each for each in only]
        if sides[0] and sides[1]:
            return False
    return True
