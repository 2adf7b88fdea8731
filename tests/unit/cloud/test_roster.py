"""Buckets and rosters: rates and daily quotas, on a clock of the test's own."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud.store import audit, tenants
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.tenants import Quotas, Tenant, Usage
from isthmus.cloud.tenants.bucket import Bucket
from isthmus.cloud.tenants.names import inside, outside
from isthmus.cloud.tenants.roster import Roster, until_tomorrow_s
from isthmus.proto.errors import Busy, Unauthenticated


@given(
    rate=st.floats(0.1, 100),
    burst=st.floats(1, 50),
    steps=st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 80)), max_size=60),
)
def test_a_bucket_never_passes_more_than_its_burst_and_its_rate(
    rate: float, burst: float, steps: list[tuple[float, float]]
) -> None:
    bucket, now_s, passed, largest = Bucket(rate, burst), 0.0, 0.0, 0.0
    for wait_s, amount in steps:
        now_s += wait_s
        needs_s = bucket.take(now_s, amount)
        if needs_s == 0:
            passed, largest = passed + amount, max(largest, amount)
            # Only one that is larger than the burst goes beyond, and then all others wait for it.
            assert passed <= burst + rate * now_s + max(0.0, largest - burst) + 1e-6
        else:
            now_s += needs_s
            assert bucket.take(now_s + 1e-6, min(amount, burst)) == 0, "who waits as long as it says gets through"
            passed += min(amount, burst)


def test_a_bucket_of_rate_zero_passes_nothing() -> None:
    assert Bucket(0.0, 1.0).take(0.0) == float("inf")


@pytest.fixture
def database(tmp_path: Path) -> Database:
    opened = Database(f"sqlite:///{tmp_path / 'isthmus.db'}")
    opened.migrate()
    return opened


def test_bytes_are_counted_over_servers_and_days(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    day, now_s = 20_000, [20_000 * 86_400.0 + 10]
    monkeypatch.setattr(database, "now_s", lambda: now_s[0])
    tenants.put(database, Tenant("a", 1.0, Quotas(bytes_per_day=100)))
    one, two = Roster(database), Roster(database)
    for roster in (one, two):
        roster.refresh()
    one.spend("a", 60)
    one.refresh()
    two.refresh()
    with pytest.raises(Busy, match="quota of bytes per day is used up; try again in 3600 s"):
        two.spend("a", 41)
    two.spend("a", 40)
    two.refresh()
    assert tenants.used(database, day) == {"a": Usage(0, 100)}
    now_s[0] += until_tomorrow_s(now_s[0])
    two.refresh()
    two.spend("a", 100)


def test_refusals_reach_the_audit_log_once_a_minute(database: Database) -> None:
    clock_s = [0.0]
    tenants.put(database, Tenant("a", 1.0, Quotas(queries_per_s=0.0)))
    roster = Roster(database, clock=lambda: clock_s[0])
    roster.refresh()
    for _ in range(3):
        for _ in range(500):
            with pytest.raises(Busy):
                roster.admit("a")
        clock_s[0] += 61.0
        roster.refresh()
    assert [entry.detail for entry in audit.listing(database)] == ["500 in the last minutes"] * 3


def test_a_closed_tenant_is_nobody(database: Database) -> None:
    tenants.put(database, Tenant("a", 1.0, closed_s=2.0))
    roster = Roster(database)
    roster.refresh()
    with pytest.raises(Unauthenticated, match="closed"):
        roster.admit("a")
    roster.admit("default")


def test_a_database_that_is_gone_loses_no_count(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    roster = Roster(database)
    roster.refresh()
    roster.spend("default", 7)
    with monkeypatch.context() as gone:
        gone.setattr(tenants, "listing", _raises)
        gone.setattr(tenants, "count", _raises)
        with pytest.raises(Busy):
            roster.refresh()
    roster.refresh()
    roster.refresh()
    day = tenants.day_of(database.now_s())
    assert tenants.used(database, day)["default"].bytes == 7


def _raises(*_: object, **__: object) -> None:
    raise Busy("gone")


def test_no_name_reaches_another_tenants_task() -> None:
    every = ("default", "acme", "b")
    for tenant in every:
        assert [outside(each, inside(tenant, "animals")) for each in every] == [
            "animals" if each == tenant else None for each in every
        ]
        for hostile in ("acme/animals", "/animals", "default/animals", "//x", "acme//animals"):
            assert {outside(each, inside(tenant, hostile)) for each in every} == {None}
