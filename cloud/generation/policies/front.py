"""PURE: admission, order and dispatch in front of several replicas, each of which runs steps of its own.

Requests wait here, in the order of an ``Order``, and not in the replicas: so that the order holds whatever the replicas
are. A replica gets a request if it has a row and room for the prompt; of several, the freest gets it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.cloud.generation.policies.orders import FirstCome, Order
from isthmus.cloud.generation.scheduling.engine import Overloaded
from isthmus.cloud.generation.scheduling.policy import Life, Limits, State
from isthmus.cloud.generation.scheduling.replicas import Standing, freest
from isthmus.proto.errors import InvalidInput


@dataclass
class _Replica:
    limits: Limits
    lives: dict[int, Life]
    draining: bool = False
    lost_until_s: float = float("-inf")
    losses: int = 0

    def used(self) -> int:
        return sum(-(-life.known // self.limits.block_tokens) for life in self.lives.values())


FIRST_PAUSE_S = 1.0
MOST_PAUSE_S = 30.0
"""A replica that failed is tried again after FIRST_PAUSE_S, then after twice as long each time."""


class Front:
    """Assigns requests to replicas 0 to n - 1. A request that its replica lost waits again, with its old rank.

    >>> front = Front([Limits(rows=1), Limits(rows=1)])
    >>> for id in range(3):
    ...     front.submit(Life(Request(id, range(8), 4, arrival_s=0.0)))
    >>> front.send(0.0), front.waiting
    ([(0, 0), (1, 1)], 1)
    >>> front.ended(1)
    >>> front.send(0.0)
    [(2, 1)]
    """

    def __init__(self, replicas: Sequence[Limits], order: Order | None = None, *, max_requests: int = 1_024) -> None:
        if not replicas or max_requests < 1:
            raise ValueError("a front needs a replica, and room for a request")
        self._replicas = [_Replica(limits, {}) for limits in replicas]
        self._order = order or FirstCome()
        self._max_requests = max_requests
        self._lives: dict[int, Life] = {}
        self._waiting: dict[int, Life] = {}
        self._of: dict[int, int] = {}

    @property
    def under_way(self) -> int:
        return len(self._lives)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, life: Life) -> None:
        """Accepts a request. Raises Overloaded if too many are under way, InvalidInput if no replica could hold it."""
        if len(self._lives) >= self._max_requests:
            raise Overloaded(f"{self._max_requests} requests are under way already; try again later")
        if all(life.request.most_tokens > each.limits.kv_tokens for each in self._replicas):
            raise InvalidInput("prompt and max_tokens are more than any replica of this server can hold")
        self._lives[life.id] = self._waiting[life.id] = life
        self._order.arrived(life)

    def standings(self, now_s: float) -> list[Standing]:
        """Returns what is known of each replica."""
        return [
            Standing(at, each.limits.blocks, each.used(), len(each.lives), 0, each.draining, now_s >= each.lost_until_s)
            for at, each in enumerate(self._replicas)
        ]

    def send(self, now_s: float) -> list[tuple[int, int]]:
        """Returns (request, replica) of the requests that begin now, in their order.

        A request that fits nowhere does not stop the ones behind it, unless it is the first in the order.
        """
        state = self._state()
        self._order.look(now_s, state)
        sent = []
        for place, life in enumerate(self._order.line(state)):
            at = self._place(life, now_s)
            if at is None:
                if place == 0:
                    break
                continue
            del self._waiting[life.id]
            self._of[life.id] = at
            self._replicas[at].lives[life.id] = life
            self._order.admitted(life)
            sent.append((life.id, at))
        return sent

    def ended(self, id: int) -> None:
        """Forgets a request, whatever its outcome. Unknown ids are ignored."""
        life = self._lives.pop(id, None)
        if life is None:
            return
        self._waiting.pop(id, None)
        at = self._of.pop(id, None)
        if at is not None:
            self._replicas[at].lives.pop(id, None)
        self._order.left(life)

    def answered(self, at: int) -> None:
        """Notes that a replica works: its next failure is its first again."""
        self._replicas[at].losses = 0
        self._replicas[at].lost_until_s = float("-inf")

    def lost(self, at: int, now_s: float, *, refuses: bool = False) -> None:
        """Notes that a replica failed: nothing is sent to it for a while. ``refuses``: it is alive, and full."""
        replica = self._replicas[at]
        replica.losses = 1 if refuses else replica.losses + 1
        replica.lost_until_s = now_s + min(MOST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(replica.losses - 1, 16))

    def wait_again(self, id: int) -> None:
        """Takes a request back from its replica. It keeps its rank."""
        life = self._lives.get(id)
        at = self._of.pop(id, None)
        if life is not None and at is not None:
            self._replicas[at].lives.pop(id, None)
            self._waiting[id] = life

    def at(self, id: int) -> int | None:
        """Returns the replica of a request; None if it waits or has ended."""
        return self._of.get(id)

    def move(self, id: int, now_s: float) -> int | None:
        """Gives a running request a place at the freest other replica, and returns it; None if there is none."""
        source = self._of[id]
        life = self._lives[id]
        target = self._place(life, now_s, but=source)
        if target is not None:
            self.put(id, target)
        return target

    def put(self, id: int, at: int) -> None:
        """Notes that a request runs at this replica. Unknown ids are ignored."""
        if id in self._of:
            life = self._replicas[self._of[id]].lives.pop(id)
            self._replicas[at].lives[id] = life
            self._of[id] = at

    def drain(self, at: int, *, draining: bool) -> None:
        """With ``draining``, sends nothing more to a replica; what it has begun ends there."""
        self._replicas[at].draining = draining

    def next_try_s(self, now_s: float) -> float | None:
        """Returns when a replica that failed may be tried again; None if none waits for that."""
        return min((each.lost_until_s for each in self._replicas if each.lost_until_s > now_s), default=None)

    def _place(self, life: Life, now_s: float, but: int | None = None) -> int | None:
        """Returns the freest replica with a row and room for what the request has and its next block, not ``but``."""
        return freest(
            standing
            for standing, replica in zip(self.standings(now_s), self._replicas, strict=True)
            if standing.id != but
            and len(replica.lives) < replica.limits.rows
            and -(-(life.known + 1) // replica.limits.block_tokens) <= replica.limits.blocks - standing.used
            and life.request.most_tokens <= replica.limits.kv_tokens
        )

    def _state(self) -> State:
        """Returns what an order looks at: all replicas together."""
        limits = Limits(
            rows=sum(each.limits.rows for each in self._replicas),
            blocks=sum(each.limits.blocks for each in self._replicas),
        )
        blocks = {id: 1 for each in self._replicas for id in each.lives}
        return State(self._lives, limits, blocks, limits.blocks - sum(each.used() for each in self._replicas))
