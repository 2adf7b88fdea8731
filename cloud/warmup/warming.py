"""Makes a store of warmed models from a vanilla model: plan, tune, profile, average. It resumes wherever it stopped.

A folder holds plan.json (what was requested, what was tuned and how long it took), tuning/ (the checkpoint of the model
in training), soups.json (what was tried) and models/ (the store that serving reads).
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.scheduling.merge_order import MergeOrder
from isthmus.cloud.elastic.warm.models import model_of
from isthmus.cloud.elastic.warm.profiled import VANILLA, Table
from isthmus.cloud.elastic.warm.store import Card, Common, WarmStore
from isthmus.cloud.warmup import soup
from isthmus.cloud.warmup.knapsack import Item, pack
from isthmus.cloud.warmup.planner import UNBOUNDED, Cost, Plan, Tuned, next_step, record
from isthmus.cloud.warmup.profiling import accuracies, check_numbers, largest_number
from isthmus.cloud.warmup.tuning import (
    DEFAULT,
    GivenUp,
    Subject,
    TuneConfig,
    predicted_seconds,
    probe,
    start,
    tensors_of_model,
    tune,
)
from isthmus.data.files import write_atomically
from isthmus.data.images import LabelledImages, PixelSpec
from isthmus.distill.training.loop import EpochReport, pick_device

MIDDLE: Final = 20
"""The paper's r_mid. One tuned model serves every number up to it."""

OnEpoch = Callable[[str, EpochReport], None]
Report = Callable[[str], None]


def order_of_models(folder: Path) -> MergeOrder | None:
    """Returns the order in which the models of a warm-up merge, or those of an evaluation's seeds.

    Returns None if there are none yet, or if they prune. Raises StoreError for a store that cannot be read.
    """
    for path in (folder / "models", *sorted(folder.glob("seed-*/models"))):
        if (order := WarmStore(path).merge_order()) is not None:
            return order
    return None


def silent(_: str) -> None:
    """Does nothing: a ``report`` for callers without an output."""


def unseen(_what: str, _report: EpochReport) -> None:
    """Does nothing: an ``on_epoch`` for callers without a progress display."""


@dataclass(frozen=True, eq=False)
class Warming:
    """The warm-up in one folder. ``numbers`` ascend: all are profiled; those from the plan's middle may be tuned."""

    folder: Path
    subject: Subject
    numbers: tuple[int, ...]
    config: TuneConfig = DEFAULT

    @property
    def store(self) -> WarmStore:
        """The store of the folder. Raises StoreError if it belongs to another task, reducer or merge order."""
        return WarmStore.create(
            self.folder / "models",
            Common(self.subject.task, self.subject.classes, self.config.reducer, self.subject.model.merge_order),
        )

    def plan(self) -> Plan | None:
        """Reads the plan in the folder; None if there is none. Raises ValueError if it belongs to another run."""
        path = self.folder / "plan.json"
        if not path.exists():
            return None
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            key, plan = raw["key"], Plan.from_json(json.dumps(raw["plan"]))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error!r}; remove it to start again") from error
        if key != self._key():
            raise ValueError(
                f"{path} belongs to another run: model, data, seed or training differ. Remove it or name another folder"
            )
        return plan

    def begin(
        self,
        *,
        middle: int | None = None,
        time_budget_s: float = UNBOUNDED,
        storage_budget_bytes: float = UNBOUNDED,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Plan:
        """Probes and makes a plan, or reads the existing plan and replaces its budgets, so they can be raised later.

        Raises BudgetTooSmall, and ValueError for numbers beyond the model's tokens.
        """
        before = self.plan()
        if before is not None:
            # With a larger time budget, a model that was given up resumes. Its seconds so far count.
            more = time_budget_s > before.time_budget_s
            tuned = tuple(one for one in before.tuned if not more or one.accuracy is not None)
            plan = dataclasses.replace(
                before, time_budget_s=time_budget_s, storage_budget_bytes=storage_budget_bytes, tuned=tuned
            )
        else:
            model = start(self.subject, self.config)
            check_numbers(self.numbers, model)
            tuned_bytes = sum(one.numel() * one.element_size() for one in model.parameters() if one.requires_grad)
            measured = probe(self.subject, self.numbers, self.config, clock=clock)
            seconds = predicted_seconds(self.subject, measured, self.numbers, self.config)
            plan = Plan(
                middle=nearest(self.numbers, MIDDLE) if middle is None else middle,
                costs={number: Cost(seconds[number], tuned_bytes) for number in self.numbers},
                time_budget_s=time_budget_s,
                storage_budget_bytes=storage_budget_bytes,
                probe_s=measured.seconds,
            )
        self._keep(plan)
        return plan

    def run(self, plan: Plan, *, on_epoch: OnEpoch = unseen, report: Report = silent) -> Plan:
        """Tunes models until the plan has no next step. Each finished model is in the store.

        Raises what ``tuning.tune`` raises. The plan is saved after every model.
        """
        self.keep_vanilla()
        while (step := next_step(plan)).number is not None:
            number, predicted_s = step.number, plan.predicted_s(step.number)
            report(f"tuning for {number}: {step.why}; predicted {predicted_s:.0f} s")
            try:
                model, seconds = tune(
                    self.subject,
                    number,
                    self.config,
                    folder=self.folder / "tuning",
                    allowance_s=plan.allowance_s,
                    on_epoch=named(f"number {number}", on_epoch),
                )
            except GivenUp as error:
                report(str(error))
                tuned = Tuned(number, None, error.seconds, 0, predicted_s)
            else:
                share = self._profiled(model, [number])[number]
                self.save(model, number, seconds, {number: share})
                tuned = Tuned(number, share, seconds, plan.costs[number].bytes, predicted_s)
                report(
                    f"{number}: accuracy {share:.1%}, {seconds:.0f} s ({seconds / predicted_s - 1:+.0%} of predicted)"
                )
            plan = record(plan, tuned)
            self._keep(plan)
            if tuned.accuracy is not None:
                for left in (self.folder / "tuning").glob(f"{number}.*"):
                    left.unlink()
        report(next_step(plan).why)
        return plan

    def keep_vanilla(self) -> None:
        """Saves the vanilla model in the store, if it is not there."""
        if VANILLA not in self.store.names():
            model = start(self.subject, self.config).eval()
            self.store.save(VANILLA, tensors_of_model(model), kind="vanilla", number=0, heads=model.heads)

    def save(self, model: ElasticViT, number: int, seconds: float, accuracy: Mapping[int, float]) -> Card:
        """Saves a tuned model in the store, with its accuracy on the profiling set by number."""
        return self.store.save(
            f"tuned-{number}",
            tensors_of_model(model),
            kind="tuned",
            number=number,
            heads=model.heads,
            accuracy=accuracy,
            pictures=len(self.subject.profiling),
            seconds=seconds,
        )

    def profile(self, report: Report = silent) -> Table:
        """Measures every model of the store at every number, and saves each result on the model's card at once."""
        for name in self.store.names():
            card = self.store.card(name)
            if not set(self.numbers) <= set(card.accuracy):
                known = self._profiled(self.model(name), self.numbers, card.accuracy)
                profiled = dataclasses.replace(
                    card, accuracy={**card.accuracy, **known}, pictures=len(self.subject.profiling)
                )
                self.store.write_card(profiled)
                report(f"{name}: " + ", ".join(f"{number} {share:.1%}" for number, share in known.items()))
        return self.table()

    def table(self) -> Table:
        """Returns the accuracies on the cards of all models."""
        return {name: self.store.card(name).accuracy for name in self.store.names()}

    def model(self, name: str) -> ElasticViT:
        """Loads a model of the store."""
        return model_of(self.store.card(name), self.store.load(name), self.subject.model, self.subject.model.schedules)

    def ensemble(self, storage_budget_bytes: float = UNBOUNDED, report: Report = silent) -> list[soup.Soup]:
        """Finds the best soup of the tuned models for each number, and keeps the soups that are worth their bytes.

        The gain of a soup is its accuracy above the best single model, including the vanilla one. A soup that serves
        several numbers is stored once, and its gains add up. Returns the best soup of each number, kept or not.
        """
        table = self.profile(report)
        members = {name: shares for name, shares in table.items() if self.store.card(name).kind == "tuned"}
        if not members:
            raise ValueError(f"{self.folder} holds no tuned models: make some with 'isthmus elastic warmup run'")
        states = {name: self.store.load(name) for name in members}
        _shared(states)
        written: dict[str, torch.Tensor] = {}
        found = [self._soup(number, members, states, written, report) for number in self.numbers]
        gains: dict[str, float] = {}
        named: dict[str, soup.Soup] = {}
        for one in found:
            key = json.dumps(sorted(one.shares.items()))
            if len(one.shares) > 1:
                named.setdefault(key, one)
                best = max(shares[one.number] for name, shares in table.items() if not name.startswith("soup-"))
                gains[key] = gains.get(key, 0.0) + max(0.0, one.accuracy - best)
        frozen = {id(tensor) for tensor in next(iter(states.values())).values() if _in_all(tensor, states)}
        own_bytes = sum(
            tensor.numel() * tensor.element_size()
            for tensor in next(iter(states.values())).values()
            if id(tensor) not in frozen
        )
        kept = pack({key: Item(gains[key], own_bytes) for key in named}, storage_budget_bytes)
        for name in self.store.names():
            if name.startswith("soup-"):
                self.store.remove(name)
        heads = self.store.card(next(iter(members))).heads
        for key in kept:
            one = named[key]
            tensors = soup.average(states, one.shares)
            name = f"soup-{one.number}"
            self.store.save(name, tensors, kind="soup", number=one.number, heads=heads, shares=one.shares)
            report(f"kept {name} ({one.method}): {gains[key]:+.2%} in all, over the numbers that it is best for")
        self.store.collect()
        self.profile(report)
        return found

    def _soup(
        self,
        number: int,
        members: Table,
        states: Mapping[str, dict[str, torch.Tensor]],
        written: dict[str, torch.Tensor],
        report: Report,
    ) -> soup.Soup:
        """Finds the best soup for ``number``. ``written`` is memory for averages, reused for every trial."""
        path = self.folder / "soups.json"
        key = json.dumps([sorted((name, members[name][number]) for name in members), number])
        tried: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        known = tried.setdefault(key, {})
        card = self.store.card(next(iter(members)))

        def evaluate(shares: soup.Shares) -> float:
            which = json.dumps(sorted((name, round(share, 9)) for name, share in shares.items()))
            if which not in known:
                written.update(soup.average(states, shares, into=written or None))
                model = model_of(card, written, self.subject.model, self.subject.model.schedules)
                known[which] = self._profiled(model, [number])[number]
                write_atomically(path, json.dumps(tried))
            return known[which]

        best = soup.ensemble(number, {name: shares[number] for name, shares in members.items()}, evaluate)
        report(
            f"soup for {number}: {best.method}, accuracy {best.accuracy:.1%}, best single model "
            f"{best.best_accuracy:.1%}"
        )
        return best

    def _profiled(
        self, model: ElasticViT, numbers: Sequence[int], known: Mapping[int, float] | None = None
    ) -> dict[int, float]:
        return accuracies(
            model,
            self.subject.pixels,
            self.subject.profiling,
            numbers,
            device=self.subject.device,
            known=known,
        )

    def _key(self) -> str:
        return f"{self.subject.key(self.config)} {self.subject.profiling.digest()[:16]} {list(self.numbers)}"

    def _keep(self, plan: Plan) -> None:
        raw = {"key": self._key(), "plan": json.loads(plan.to_json())}
        write_atomically(self.folder / "plan.json", json.dumps(raw, indent=1))


def find_ratio(
    model: ElasticViT,
    pixels: PixelSpec,
    learning: LabelledImages,
    profiling: LabelledImages,
    classes: Sequence[str],
    folder: Path,
    *,
    task: str = "task",
    numbers: Sequence[int] | None = None,
    config: TuneConfig = DEFAULT,
    middle: int | None = None,
    time_budget_s: float = math.inf,
    storage_budget_bytes: float = math.inf,
    soups: bool = True,
    device: str = "auto",
    on_epoch: OnEpoch = unseen,
    report: Report = silent,
) -> tuple[WarmStore, Table]:
    """Makes warmed models from a model and a data set: Find_Ratio of Prodigy, from planning to averaging.

    ``model`` is the vanilla model, with a head for ``classes``. ``numbers`` are the reduction numbers; the default is 0
    and nine more up to the largest possible. Called again with the same arguments, it resumes. Returns the store, which
    ``isthmus cloud serve --elastic-warm`` serves, and the accuracy of each model at each number on ``profiling``.

    Raises BudgetTooSmall, ValueError for numbers beyond the model's tokens and for pictures that lack a class,
    TrainingDiverged, CheckpointError if the folder belongs to another run, StoreError if its models merge in another
    order than ``model`` (``ElasticViT(..., merge_order=...)``; before it had a name it was "receiving-first"), and
    DiskFull.
    """
    subject = Subject(task, tuple(classes), model, pixels, learning, profiling, pick_device(device))
    if numbers is None:
        most = largest_number(start(subject, config))
        numbers = sorted({round(number) for number in np.linspace(0, most, 10)})
    warming = Warming(folder, subject, check_numbers(numbers, start(subject, config)), config)
    plan = warming.begin(middle=middle, time_budget_s=time_budget_s, storage_budget_bytes=storage_budget_bytes)
    plan = warming.run(plan, on_epoch=on_epoch, report=report)
    table = warming.profile(report)
    if soups and plan.models:
        warming.ensemble(storage_budget_bytes - plan.stored_bytes, report)
        table = warming.table()
    return warming.store, table


def nearest(numbers: Sequence[int], wanted: int) -> int:
    """Returns the number nearest ``wanted``, except the largest number. Of two equally near ones it is the larger.

    Raises ValueError for fewer than two numbers.
    """
    if len(numbers) < 2:
        raise ValueError(f"at least two numbers are needed, not {list(numbers)}")
    return min(sorted(numbers)[:-1], key=lambda number: (abs(number - wanted), -number))


def named(what: str, on_epoch: OnEpoch) -> Callable[[EpochReport], None]:
    """Returns ``on_epoch`` for one of several runs, in the form that training calls."""
    return lambda report: on_epoch(what, report)


def _shared(states: Mapping[str, dict[str, torch.Tensor]]) -> None:
    """Replaces tensors that are bitwise equal in all states by one tensor, in place."""
    first, *others = states.values()
    for key, tensor in first.items():
        for other in others:
            if torch.equal(other[key], tensor):
                other[key] = tensor


def _in_all(tensor: torch.Tensor, states: Mapping[str, Mapping[str, torch.Tensor]]) -> bool:
    return all(any(other is tensor for other in state.values()) for state in states.values())
