"""The tenants as a server knows them: their keys and quotas in memory, read again every few seconds.

``admit`` and ``spend`` cost no look at the database, so a call beyond a quota is refused before it costs anything. What
is used of daily quotas is added to the database every few seconds; servers of one database may therefore together let a
tenant exceed a daily quota of bytes by what passes in that time. A rate holds per server.
"""

import hashlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from isthmus.cloud.store import audit, tenants
from isthmus.cloud.store.audit import Entry
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.tenants import DAY_S, DEFAULT, Purpose, Quotas, Tenant, day_of
from isthmus.cloud.tenants.bucket import Bucket
from isthmus.proto.errors import Busy, IsthmusError, Unauthenticated

log = logging.getLogger(__name__)

READ_EVERY_S: Final = 2.0
_TELL_EVERY_S: Final = 60.0
"""How often refusals are added to the audit log, as one entry per tenant and quota, so that no flood fills it."""
_BURST_S: Final = 1.0
"""A tenant may use the queries of one second at once."""
_LONGEST_RETRY_S: Final = 3_600.0
_UNLIMITED: Final = Quotas()


@dataclass(frozen=True)
class _View:
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    keys: Mapping[tuple[bytes, str], str] = field(default_factory=dict)
    used_bytes: Mapping[str, int] = field(default_factory=dict)
    day: int = 0


class Roster:
    """Safe to use from several threads. Call ``refresh`` before the first use, and every ``READ_EVERY_S`` then."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._clock = clock
        self._lock = threading.Lock()
        self._view = _View()
        self._buckets: dict[str, tuple[float, Bucket]] = {}
        self._spent: Counter[str] = Counter()
        self._told: Counter[tuple[str, str]] = Counter()
        self._told_s = clock()
        self.calls: Counter[str] = Counter()
        """Calls, frames and images by tenant, refused ones included."""
        self.refused: Counter[tuple[str, str]] = Counter()
        """Refusals by tenant and quota."""

    def refresh(self) -> None:
        """Read tenants, keys and usage, and write what was spent. Blocking. Raises IsthmusError without a database."""
        now_s = self._database.now_s()
        day = day_of(now_s)
        with self._lock:
            spent, self._spent = self._spent, Counter()
            refused = self.refused - self._told if self._clock() - self._told_s >= _TELL_EVERY_S else Counter()
        try:
            if spent or refused:
                with self._database.writing() as connection:
                    # In one order, so that servers that do the same do not wait for each other.
                    for tenant, count in sorted(spent.items()):
                        tenants.count(connection, tenant, day, bytes=count)
                    for (tenant, quota), count in sorted(refused.items()):
                        entry = Entry(now_s, tenant, "server", "refused", quota, f"{count} in the last minutes")
                        audit.write(connection, entry)
                    spent = Counter()
            with self._lock:
                if refused:
                    self._told += refused
                    self._told_s = self._clock()
            known = {tenant.name: tenant for tenant in tenants.listing(self._database)}
            keys = {(key.key_hash, key.purpose): key.tenant for key in tenants.keys(self._database)}
            used = tenants.used(self._database, day)
        except IsthmusError:
            with self._lock:
                self._spent.update(spent)
            raise
        with self._lock:
            self._view = _View(known, keys, {name: each.bytes for name, each in used.items()}, day)

    def names(self) -> list[str]:
        """Return the names of all tenants, "default" among them."""
        return sorted({DEFAULT, *self._view.tenants})

    def quotas(self, tenant: str) -> Quotas:
        """Return the quotas of a tenant; one without a row has none."""
        known = self._view.tenants.get(tenant)
        return _UNLIMITED if known is None else known.quotas

    def of_key(self, secret: str, purpose: Purpose) -> str | None:
        """Return the tenant to which a key belongs, or None. Closed tenants have no keys."""
        tenant = self._view.keys.get((hashlib.sha256(secret.encode()).digest(), purpose))
        return None if tenant is None or self.is_closed(tenant) else tenant

    def has_keys(self, purpose: Purpose) -> bool:
        """Return whether any tenant has a key of this purpose."""
        return any(each == purpose for _, each in self._view.keys)

    def is_closed(self, tenant: str) -> bool:
        """Return whether a tenant was closed."""
        known = self._view.tenants.get(tenant)
        return known is not None and known.closed_s is not None

    def admit(self, tenant: str, amount: int = 1) -> None:
        """Count ``amount`` calls, frames or images of a tenant. Raises Busy beyond its quota.

        Raises Unauthenticated if the tenant was closed.
        """
        with self._lock:
            self.calls[tenant] += amount
            known = self._view.tenants.get(tenant)
            if known is None:
                return
            if known.closed_s is not None:
                self.refused[tenant, "closed"] += amount
                raise Unauthenticated("this tenant was closed; ask the operator")
            rate = known.quotas.queries_per_s
            if rate is None:
                return
            limit = self._buckets.get(tenant)
            if limit is None or limit[0] != rate:
                limit = self._buckets[tenant] = rate, Bucket(rate, max(1.0, rate * _BURST_S))
            wait_s = limit[1].take(self._clock(), amount)
            if wait_s > 0:
                self.refused[tenant, "queries"] += amount
                raise _beyond("queries per second", wait_s)

    def spend(self, tenant: str, count: int) -> None:
        """Count bytes of a tenant. Raises Busy beyond its quota."""
        with self._lock:
            limit = self.quotas(tenant).bytes_per_day
            if limit is not None:
                today = self._view.used_bytes.get(tenant, 0) + self._spent[tenant]
                # An empty message costs nothing, but once all is used up nothing passes.
                if today + max(1, count) > limit:
                    self.refused[tenant, "bytes"] += 1
                    raise _beyond("bytes per day", until_tomorrow_s(self._database.now_s()))
            self._spent[tenant] += count

    def refuse(self, tenant: str, quota: str) -> None:
        """Count a refusal that another place made."""
        with self._lock:
            self.refused[tenant, quota] += 1

    def counted(self) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
        """Return copies of ``calls`` and ``refused``."""
        with self._lock:
            return dict(self.calls), dict(self.refused)


def until_tomorrow_s(now_s: float) -> float:
    """Return the seconds until the next day (UTC)."""
    return DAY_S - now_s % DAY_S


def _beyond(what: str, wait_s: float) -> Busy:
    retry_s = None if math.isinf(wait_s) else round(min(_LONGEST_RETRY_S, max(0.1, wait_s)), 1)
    way_out = "ask the operator for a higher one" if retry_s is None else f"try again in {retry_s:g} s"
    return Busy(f"your quota of {what} is used up; {way_out}", retry_after_s=retry_s)
