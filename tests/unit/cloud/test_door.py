"""A call beyond its tenant's quota is refused before anything is done for it, and each call is counted once."""

import asyncio
import contextvars
from pathlib import Path
from typing import Any

import grpc
import pytest

from isthmus.cloud.metrics.calls import Metrics
from isthmus.cloud.rpc.door import Door
from isthmus.cloud.store import tenants
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.tenants import Quotas, Tenant
from isthmus.cloud.tenants.roster import Roster
from isthmus.proto.errors import NAME_KEY, RETRY_KEY, Busy

METHOD = "/isthmus.v1.PersonalisationService/DescribeStudent"


class Context:
    """Remembers how the call was ended."""

    async def abort(self, *ended: Any) -> None:
        self.ended = ended


@pytest.fixture
def roster(tmp_path: Path) -> Roster:
    database = Database(f"sqlite:///{tmp_path / 'isthmus.db'}")
    database.migrate()
    tenants.put(database, Tenant("a", 1.0, Quotas(queries_per_s=1.0)))
    made = Roster(database, clock=lambda: 0.0)
    made.refresh()
    return made


def call(door: Door, token: str, tenant: str = "a") -> Any:
    """Make a call as the server does, in a context of its own: return what refuses it, else learn whose it was."""

    def made() -> Any:
        refusing = door.refusing(METHOD, {"authorization": f"Bearer {token}"})
        if refusing is None:
            door.learn(token, tenant)
        return refusing

    return contextvars.copy_context().run(made)


def test_only_a_known_device_beyond_its_quota_is_refused_at_the_door(roster: Roster) -> None:
    metrics = Metrics()
    door = Door(roster, metrics)
    assert call(door, "one") is None, "the one query that may be asked at once"
    refusing = call(door, "one")
    assert roster.counted() == ({"a": 2}, {("a", "queries"): 1})
    context = Context()
    asyncio.run(refusing.stream_unary(None, context))
    code, text, trailing = context.ended
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "quota of queries per second is used up" in text
    assert dict(trailing) == {NAME_KEY: "Busy", RETRY_KEY: "1000"}
    service, _, method = METHOD[1:].partition("/")
    handled = {"grpc_service": service, "grpc_method": method, "grpc_type": "unary", "grpc_code": code.name}
    assert metrics.registry.get_sample_value("grpc_server_handled_total", handled) == 1
    with pytest.raises(Busy):  # another device of the tenant, which the door does not know yet
        call(door, "two")
    assert door.refusing(METHOD, {}) is None, "without a token there is nobody to refuse"
    assert call(door, "three", "default") is None and call(door, "three", "default") is None


def test_devices_of_a_closed_tenant_are_left_to_those_who_answer_them(roster: Roster) -> None:
    door = Door(roster, Metrics())
    assert call(door, "one") is None
    tenants.put(roster._database, Tenant("a", 1.0, closed_s=2.0))
    roster.refresh()
    assert door.refusing(METHOD, {"authorization": "Bearer one"}) is None


def test_a_token_that_is_no_longer_good_uses_up_no_quota(roster: Roster) -> None:
    door = Door(roster, Metrics())
    assert call(door, "revoked") is None
    assert call(door, "revoked") is not None, "known: it is refused at the door"
    door.forget("revoked")
    counted = roster.counted()
    assert door.refusing(METHOD, {"authorization": "Bearer revoked"}) is None
    assert roster.counted() == counted


def test_a_tenant_that_is_closed_between_two_looks_fails_no_call(
    roster: Roster, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = Door(roster, Metrics())
    assert call(door, "one") is None
    tenants.put(roster._database, Tenant("a", 1.0, closed_s=2.0))
    roster.refresh()
    monkeypatch.setattr(roster, "is_closed", lambda tenant: False)  # the look before it was closed
    assert door.refusing(METHOD, {"authorization": "Bearer one"}) is None
