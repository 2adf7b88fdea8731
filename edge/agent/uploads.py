"""The uploads of prototypes: those that wait, those that were made, and what they spend of the privacy budget."""

import uuid
from collections.abc import Callable

from isthmus.edge.agent.device_state import DeviceState, LedgerEntry
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.behaviour.state import State
from isthmus.edge.behaviour.step import NothingToSend
from isthmus.edge.capture.sources import Clock
from isthmus.edge.link.interface import Link
from isthmus.edge.link.outbox import Entry, Outbox
from isthmus.edge.own_clips import budget as budgets
from isthmus.edge.own_clips.budget import Budget
from isthmus.proto.convert import prototypes_from_pb, prototypes_to_pb
from isthmus.proto.limits import MAX_ROUNDS
from isthmus.proto.messages import JobStatus, Prototypes
from isthmus.proto.v1 import isthmus_pb2 as pb


class Uploads:
    """The uploads of one device. ``unix_clock`` returns Unix time in seconds. Raises Corrupt for a damaged outbox."""

    def __init__(self, config: RunConfig, device: DeviceState, link: Link, unix_clock: Clock) -> None:
        self._config = config
        self._device = device
        self._link = link
        self._unix_clock = unix_clock
        self._outbox = Outbox(device.root / "outbox.sqlite")

    @property
    def affordable(self) -> bool:
        """Whether the person's privacy budget allows one more upload."""
        if self._device.budget() is None:
            return True  # The enrolment pins it; nothing may be written before that.
        try:
            budgets.check(self.budget(), self._spent(), self._config.choices.noise)
        except budgets.BudgetSpent:
            return False
        return True

    def budget(self) -> Budget:
        """Return the person's budget with this run's choices, and write it if they change it. Raises BudgetSpent."""
        stored = self._device.budget()
        known = budgets.pinned(stored, 0)
        choices = self._config.choices
        budget = budgets.chosen(
            known, rounds=self._config.rounds, noise=choices.noise, epsilon=self._config.epsilon_budget
        )
        if budget != stored:
            self._device.save_budget(budget)
        return budget

    def most_rounds(self) -> int:
        """Return the uploads that the person allows in one personalisation. Raises BudgetSpent."""
        if self._device.budget() is None:
            return self._config.rounds or MAX_ROUNDS  # Pinned at the enrolment, before any upload.
        return budgets.allowed_rounds(self.budget(), self._config.rounds)

    def fill(self, round: int, make: Callable[[], Prototypes]) -> None:
        """Put the prototypes that ``make`` returns into the outbox.

        Waiting ones are kept: making them again would spend the privacy budget twice. Raises BudgetSpent, and what
        ``make`` raises.
        """
        if self._outbox.get(_entry_name(round)) is None:
            budgets.check(self.budget(), self._spent(), self._config.choices.noise)
            payload = prototypes_to_pb(make()).SerializeToString()
            self._outbox.put(Entry(_entry_name(round), uuid.uuid4().hex, payload, self._unix_clock()))

    def send(self, state: State, job_id: str, round: int) -> JobStatus:
        """Send the waiting prototypes: to a job, or with ``job_id`` "" to start one. They enter the ledger first.

        Raises NothingToSend if none wait, BudgetSpent, and the link's errors.
        """
        entry = self._outbox.get(_entry_name(round))
        if entry is None:
            raise NothingToSend(f"the prototypes of round {round + 1} are gone from the outbox")
        prototypes = prototypes_from_pb(pb.Prototypes.FromString(entry.payload))
        budget = self.budget()
        if all(known.idempotency_key != entry.idempotency_key for known in self._device.ledger()):
            budgets.check(budget, self._spent(), prototypes.epsilon)
        self._device.add_to_ledger(
            LedgerEntry(
                idempotency_key=entry.idempotency_key,
                round=round,
                mode=prototypes.mode.value,
                rows=len(prototypes.sizes_K),
                smallest=int(prototypes.sizes_K.min()),
                sizes=tuple(int(size) for size in prototypes.sizes_K),
                message_bytes=len(entry.payload),
                epsilon=prototypes.epsilon,
                sent_s=self._unix_clock(),
            )
        )
        if job_id:
            return self._link.upload_prototypes(job_id, round, prototypes)
        # Another job with the same prototypes needs another key, and reveals nothing new.
        key = f"{entry.idempotency_key}-{state.jobs}" if state.jobs else entry.idempotency_key
        rounds = budgets.affordable_rounds(budget, self._spent(), prototypes.epsilon, state.most_rounds)
        return self._link.start_personalisation(key, prototypes, rounds=rounds, seed=self._config.seed)

    def acknowledge(self, round: int) -> None:
        """Remove the prototypes of a round: the cloud has them."""
        self._outbox.acknowledge(_entry_name(round))

    def clear(self) -> None:
        """Remove everything that waits."""
        self._outbox.clear()

    def close(self) -> None:
        self._outbox.close()

    def _spent(self) -> float:
        return budgets.spent(entry.epsilon for entry in self._device.ledger())


def _entry_name(round: int) -> str:
    return f"prototypes/{round}"
