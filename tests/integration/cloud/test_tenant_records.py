"""What an operator does with tenants by the command, and what the audit log says of them."""

import asyncio
import time
from pathlib import Path

import grpc
from typer.testing import CliRunner

from isthmus.cloud.commands.cloud import app
from isthmus.cloud.store import audit, devices, tenants
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.tenants import Quotas
from isthmus.proto.v1 import elastic_pb2
from isthmus.proto.v1 import isthmus_pb2 as pb
from tests.rigs.cloud.tenants import shared
from tests.rigs.elastic.server import THREE

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_audit_log_names_what_happened_and_forgets_what_is_erased(tiny_release: Path, tmp_path: Path) -> None:
    state = ["--state", str(tmp_path / "state")]

    def run(*words: str) -> str:
        done = CliRunner().invoke(app, [*words, *state])
        assert done.exit_code == 0, done.output
        return done.stdout

    async def scenario() -> tuple[str, str]:
        async with shared(tmp_path, tiny_release, {"b": Quotas(most_devices=0)}) as on:
            first, second = await on.enrol("a"), await on.enrol("a")
            assert (await on.rig.refusal(on.enrol("b")))[0] is EXHAUSTED
            assert devices.revoke(on.database, first.device_id, time.time())
            await second.personalisation.Forget(pb.ForgetRequest(), metadata=second.metadata)
            await on.elastic.RegisterTask(THREE[0].messages(), metadata=on.key("a"))
            await on.elastic.RemoveTask(elastic_pb2.RemoveTaskRequest(name="ten"), metadata=on.key("a"))
            on.server.roster._told_s = float("-inf")
            await asyncio.to_thread(on.server.roster.refresh)
            entries = audit.listing(on.database)
            seen = [(each.tenant, each.action, each.subject) for each in entries if each.tenant in ("a", "b")]
            assert seen == [
                ("a", "enrolled", first.device_id),
                ("a", "enrolled", audit.ERASED),
                ("a", "revoked", first.device_id),
                ("a", "erased", audit.ERASED),
                ("a", "registered", "a/ten"),
                ("a", "removed", "a/ten"),
                ("b", "refused", "devices"),
            ]
            assert [each.action for each in entries if each.tenant == ""] == ["published"], "the base student"
            release = [each.action for each in entries if each.tenant == tenants.DEFAULT]
            assert release == ["published release", "offered release"]
            return await asyncio.to_thread(run, "audit"), second.device_id

    shown, erased = asyncio.run(scenario())
    assert erased not in shown and "a/ten" in shown
    assert run("audit", "--tenant", "b").count("refused") == 1


def test_tenants_are_made_changed_and_closed_by_the_command(tiny_release: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with shared(tmp_path, tiny_release):
            pass

    asyncio.run(scenario())
    state, key = ["--state", str(tmp_path / "state")], tmp_path / "acme.key"

    def run(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["tenants", *state, *words])
        assert done.exit_code == code, done.output
        assert code == 0 or done.stderr.strip().count("\n") == 0
        return done.stdout

    run("--add", "acme", "--devices", "5", "--queries-per-s", "0.5")
    run("--add", "acme", code=1)
    run("--add", "ACME/x", code=1)
    run("--change", "acme", "--devices", "none", "--bytes-per-day", "0")
    run("--change", "acme", "--devices", "-1", code=1)
    run("--change", "nobody", "--devices", "1", code=1)
    run("--new-key", "acme", "--key-file", str(key))
    run("--new-key", "acme", "--key-file", str(key), code=1)
    run("--new-key", "default", "--key-file", str(tmp_path / "other"), code=1)
    assert (key.stat().st_mode & 0o777, len(key.read_text().strip()) >= 43) == (0o600, True)
    run("--close", "acme")
    line = next(line for line in run().splitlines() if line.startswith("acme"))
    assert line.split("\t") == ["acme", "closed", "1", "none", "none", "none", "0.5", "0", "0", "0"]
    database = Database(f"sqlite:///{tmp_path / 'state' / 'isthmus.db'}")
    assert key.read_text().strip().encode() not in (tmp_path / "state" / "isthmus.db").read_bytes()
    actions = [entry.action for entry in audit.listing(database, tenant="acme")]
    assert actions == ["added", "changed", "made key", "closed"]
    database.close()
