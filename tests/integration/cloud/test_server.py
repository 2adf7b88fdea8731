"""Starting and stopping a server: it refuses bad settings and leaves nothing behind."""

import asyncio
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from typer.testing import CliRunner

from isthmus.cloud import server as server_module
from isthmus.cloud.commands import serving
from isthmus.cloud.commands.cloud import app
from isthmus.cloud.settings import CloudSettings
from isthmus.cloud.store import lock
from isthmus.cloud.store.database import Database
from isthmus.proto.errors import InvalidInput, Locked
from isthmus.proto.v1 import isthmus_pb2 as pb
from tests.rigs.cloud.certificate import write_certificate
from tests.rigs.cloud.service import BASE_FILE_BYTES
from tests.rigs.project.patience import HANGS_S


def test_a_second_server_on_the_same_database_is_refused(rig: Any) -> None:
    async def scenario() -> None:
        async with rig.running():
            with pytest.raises(Locked, match="another server"):
                async with rig.running():
                    pass
        async with rig.running() as (_, channel):
            assert (await rig.enrol(channel)).device_id

    asyncio.run(scenario())


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """Restore logging after a command that configures the process's log."""
    ours, root = logging.getLogger("isthmus.cloud"), logging.getLogger()
    before = ours.level, root.level, root.handlers[:]
    yield
    ours.setLevel(before[0])
    root.setLevel(before[1])
    root.handlers[:] = before[2]


@pytest.mark.usefixtures("logging_restored")
def test_the_command_says_in_one_line_why_it_cannot_start(rig: Any, tiny_release: Path, tmp_path: Path) -> None:
    def serve(*options: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["serve", "--state", str(rig.state), *options])
        return result.exit_code, result.stderr.strip()

    rig.state.mkdir()
    held = lock.acquire(Database(rig.settings().database_url), "server")
    release = ("--release", str(tiny_release))
    code, message = serve(*release)
    assert (code, len(message.splitlines())) == (1, 1)
    assert "is using this database. Stop it, or" in message
    held.release()
    code, message = serve()
    assert code == 2 and message == (
        "isthmus cloud serve: nothing to serve: give --release, --elastic-model, --elastic-variants, "
        "--generate-model or several"
    )
    code, message = serve("--release", str(tmp_path / "nowhere"))
    assert (code, len(message.splitlines())) == (1, 1)
    assert "isthmus distill teacher" in message
    code, message = serve(*release, "--listen", "0.0.0.0:0")
    assert code == 2
    assert "--tls-cert" in message


def test_the_address_is_written_when_ready_and_a_taken_port_is_refused(rig: Any, tmp_path: Path) -> None:
    port_file = tmp_path / "port"

    async def scenario() -> None:
        async with rig.running(port_file=port_file):
            address = port_file.read_text().strip()
            assert address.startswith("127.0.0.1:")
            with pytest.raises(InvalidInput, match="cannot listen"):
                async with rig.running(listen=address, state=tmp_path / "other"):
                    pass

    asyncio.run(scenario())


def test_a_server_that_stops_tells_its_streams_and_lets_other_calls_end(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_GRACE_S", HANGS_S)  # a busy machine takes longer than the usual two seconds

    async def scenario() -> tuple[list[tuple[grpc.StatusCode, str]], int]:
        async with rig.running() as (server, channel):
            device = await rig.enrol(channel)
            job = await rig.start(device)
            manifest = await device.describe()
            frames = device.inference.Infer(metadata=(*device.metadata, ("isthmus-student", manifest.student_id)))
            await frames.write(pb.InferRequest(sequence=0, frame=b"no frame"))
            assert (await frames.read()).error.code
            watch = device.personalisation.WatchJob(pb.WatchJobRequest(job_id=job.job_id), metadata=device.metadata)
            await watch.read()
            request = pb.FetchStudentRequest(student_id=manifest.student_id, file_name=manifest.files[0].name)
            download = device.personalisation.FetchStudent(request, metadata=device.metadata)
            received = len((await download.read()).data)
            stopping = asyncio.create_task(server.stop())
            told = [await rig.refusal(stream.read()) for stream in (frames, watch)]
            while chunk := await download.read():
                received += len(chunk.data)
            await stopping
            return told, received

    told, received = asyncio.run(scenario())
    assert told == [(grpc.StatusCode.UNAVAILABLE, "this server stops; connect again")] * 2
    assert received == BASE_FILE_BYTES, "a download that had begun is finished"


def test_if_one_way_of_answering_cannot_be_ended_the_other_is_ended_all_the_same(rig: Any) -> None:
    async def scenario() -> list[str]:
        ended: list[str] = []

        async def fails() -> None:
            raise OSError("the socket is gone")

        async def ends() -> None:
            for _ in range(3):
                await asyncio.sleep(0)
            ended.append("the other")

        server = server_module.Server(rig.settings())
        with pytest.raises(OSError, match="the socket is gone"):
            await server._stop_answering([fails, ends])
        return ended

    assert asyncio.run(scenario()) == ["the other"]


@pytest.mark.usefixtures("logging_restored")
def test_what_is_there_is_spared_by_the_garbage_collector_before_a_server_says_that_it_listens(
    rig: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port_file = tmp_path / "port"
    written: list[bool] = []

    def spared() -> None:  # of this process of tests nothing is spared
        written.append(port_file.exists())
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(serving, "spare_what_is_there", spared)
    serving.serve(rig.settings(workers=0, port_file=port_file))
    assert written == [False] and port_file.exists()


def test_over_tls_only_those_who_trust_the_certificate_get_in(rig: Any, tmp_path: Path) -> None:
    cert, key, enrolment_key = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "enrolment"
    write_certificate(cert, key)
    enrolment_key.write_text("sesame")
    address_file = tmp_path / "port"

    async def scenario() -> grpc.StatusCode:
        settings = {"listen": "0.0.0.0:0", "tls_cert": cert, "tls_key": key, "enrolment_key_file": enrolment_key}
        async with rig.running(**settings, port_file=address_file) as (_, plain):
            address = f"localhost:{address_file.read_text().strip().rpartition(':')[2]}"
            credentials = grpc.ssl_channel_credentials(cert.read_bytes())
            async with grpc.aio.secure_channel(address, credentials) as channel:
                device = await rig.enrol(channel, key="sesame")
                assert (await device.describe()).kind == "base"
            return (await rig.refusal(rig.enrol(plain, key="sesame")))[0]

    assert asyncio.run(scenario()) is grpc.StatusCode.UNAVAILABLE


def test_devices_and_jobs_can_be_listed_beside_a_running_server(rig: Any) -> None:
    runner = CliRunner()
    state = ["--state", str(rig.state)]

    async def scenario() -> tuple[str, str]:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel, "kiosk")
            job = await rig.start(device)
            listed = await asyncio.to_thread(runner.invoke, app, ["devices", *state])
            assert device.device_id in listed.stdout
            assert "kiosk" in listed.stdout
            listed = await asyncio.to_thread(runner.invoke, app, ["jobs", *state])
            assert job.job_id in listed.stdout
            assert "queued" in listed.stdout
            return device.device_id, device.metadata[0][1]

    device_id, bearer = asyncio.run(scenario())
    assert runner.invoke(app, ["devices", *state, "--revoke", device_id]).exit_code == 0
    listed = runner.invoke(app, ["devices", *state])
    assert "revoked" in listed.stdout
    assert bearer.rpartition(".")[2] not in listed.stdout
    again = runner.invoke(app, ["devices", *state, "--revoke", device_id])
    assert (again.exit_code, len(again.stderr.strip().splitlines())) == (1, 1)
    assert runner.invoke(app, ["jobs"]).exit_code == 2
    assert runner.invoke(app, ["jobs", "--state", str(rig.state / "none")]).exit_code == 1


def test_metrics_count_calls_by_method_and_status(rig: Any) -> None:
    async def scenario() -> str:
        async with rig.running(metrics_port=0) as (server, channel):
            device = await rig.enrol(channel)
            await device.describe()
            await rig.refusal(device.describe("no-such-student"))
            url = f"http://127.0.0.1:{server.metrics_port}/metrics"
            return (await asyncio.to_thread(lambda: urlopen(url).read())).decode()

    text = asyncio.run(scenario())
    service = 'grpc_service="isthmus.v1.PersonalisationService",grpc_type="unary"'
    assert f'grpc_server_handled_total{{grpc_code="OK",grpc_method="Enrol",{service}}} 1.0' in text
    assert f'grpc_server_handled_total{{grpc_code="NOT_FOUND",grpc_method="DescribeStudent",{service}}} 1.0' in text
    assert 'isthmus_jobs{stage="queued"} 0.0' in text and "isthmus_devices 1.0" in text


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.168.1.4:50051", "example.org:1"])
def test_beyond_loopback_tls_and_a_key_are_required(tmp_path: Path, listen: str) -> None:
    paths = {"release": tmp_path, "state": tmp_path, "listen": listen}
    file = tmp_path / "file"
    with pytest.raises(ValueError, match="--tls-cert and --tls-key and --enrolment-key-file"):
        CloudSettings(**paths)
    with pytest.raises(ValueError, match="needs --enrolment-key-file"):
        CloudSettings(**paths, tls_cert=file, tls_key=file)
    assert CloudSettings(**paths, tls_cert=file, tls_key=file, enrolment_key_file=file).listen == listen


def test_representations_contain_no_secrets(tmp_path: Path) -> None:
    settings = CloudSettings(release=tmp_path, state=tmp_path, database="postgresql://me:hush@db/x")
    assert "hush" not in f"{settings!r} {settings}"
    assert settings.database_url.endswith("me:hush@db/x")
    assert "hush" in settings.to_json()
    assert CloudSettings.from_json(settings.to_json()) == settings


def test_an_unexpected_failure_is_reported_by_reference_and_logged_in_full(
    rig: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a secret detail")

    async def scenario() -> tuple[grpc.StatusCode, str]:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            monkeypatch.setattr("isthmus.cloud.personalise.students.describe", broken)
            return await rig.refusal(device.describe())

    code, message = asyncio.run(scenario())
    assert code is grpc.StatusCode.INTERNAL
    assert "secret detail" not in message
    reference = message.rpartition(" ")[2]
    assert reference in caplog.text
    assert "a secret detail" in caplog.text
