"""TLS of both sides: the server reads its certificate again while it serves; devices are bound to theirs."""

import asyncio
import logging
import ssl
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from isthmus.cloud.rpc.transport import Certificates
from isthmus.cloud.settings import CloudSettings
from isthmus.edge.commands.options import CloudOptions
from isthmus.edge.link.over_grpc import GrpcLink, open_channel
from isthmus.proto.errors import InvalidInput
from isthmus.proto.v1 import isthmus_pb2 as pb
from isthmus.proto.v1 import isthmus_pb2_grpc as pb_grpc
from tests.rigs.cloud.certificate import Authority
from tests.rigs.project.patience import HANGS_S

OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


def channel(port: int, ca: Path, pair: tuple[Path, Path] | None = None) -> grpc.aio.Channel:
    chain, key = (pair[0].read_bytes(), pair[1].read_bytes()) if pair is not None else (None, None)
    credentials = grpc.ssl_channel_credentials(ca.read_bytes(), key, chain)
    return grpc.aio.secure_channel(f"localhost:{port}", credentials, OWN_CONNECTION)


def test_a_certificate_is_replaced_under_load_and_no_call_fails(rig: Any, tmp_path: Path) -> None:
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    cert, key = old.sign("localhost")

    async def scenario() -> int:
        async with (
            rig.running(listen="localhost:0", tls_cert=cert, tls_key=key) as (server, _),
            channel(server.port, old.path) as before,
        ):
            device = await rig.enrol(before)
            done, stop = 0, asyncio.Event()

            async def load() -> None:
                nonlocal done
                while not stop.is_set():
                    await device.describe()
                    done += 1

            calling = [asyncio.create_task(load()) for _ in range(4)]
            # A half-written file changes nothing.
            good = cert.read_bytes()
            cert.write_bytes(good[:100])
            async with channel(server.port, old.path) as meanwhile:
                assert await rig.enrol(meanwhile)
            for path, made in zip((cert, key), new.sign("localhost"), strict=True):
                made.replace(path)
            async with channel(server.port, new.path) as after:
                assert await rig.enrol(after)
            async with channel(server.port, old.path) as late:
                request = pb.EnrolRequest(device_name="late")
                call = pb_grpc.PersonalisationServiceStub(late).Enrol(request, timeout=HANGS_S)
                assert (await rig.refusal(call))[0] is grpc.StatusCode.UNAVAILABLE
            reached = done
            while done < reached + 4:
                await asyncio.sleep(0.01)
            stop.set()
            await asyncio.gather(*calling)  # raises what a call raised
            return done

    assert asyncio.run(scenario()) > 4


def test_a_device_is_bound_to_the_certificate_with_which_it_enrolled(rig: Any, tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    cert, key = ours.sign("localhost")

    async def scenario() -> None:
        settings = {"listen": "localhost:0", "tls_cert": cert, "tls_key": key, "tls_client_ca": ours.path}
        async with rig.running(**settings) as (server, _):
            async with channel(server.port, ours.path, ours.sign("kiosk-1")) as first:
                device = await rig.enrol(first)
                assert (await device.describe()).student_id
                # The certificate alone is enough, since one device enrolled with it.
                stub = pb_grpc.PersonalisationServiceStub(first)
                assert await stub.DescribeStudent(pb.DescribeStudentRequest())
            # A renewed certificate of the same name is the same device's.
            async with channel(server.port, ours.path, ours.sign("kiosk-1")) as renewed:
                stub = pb_grpc.PersonalisationServiceStub(renewed)
                assert await stub.DescribeStudent(pb.DescribeStudentRequest(), metadata=device.metadata)
            async with channel(server.port, ours.path, ours.sign("kiosk-2")) as other:
                stub = pb_grpc.PersonalisationServiceStub(other)
                for metadata in (device.metadata, ()):
                    call = stub.DescribeStudent(pb.DescribeStudentRequest(), metadata=metadata)
                    assert (await rig.refusal(call))[0] is grpc.StatusCode.UNAUTHENTICATED
            # A device as it is, with the options --tls-ca, --tls-cert and --tls-key.
            own = open_channel(f"localhost:{server.port}", tls_ca=ours.path, own=ours.sign("kiosk-3"))
            link = GrpcLink(own)
            enrolment = await asyncio.to_thread(link.enrol, "kiosk-3", "")
            link.authenticate(enrolment.token)
            assert (await asyncio.to_thread(link.describe_student, "")).manifest_bytes
            link.close()
            for pair in (None, theirs.sign("kiosk-1")):
                async with channel(server.port, ours.path, pair) as foreign:
                    call = pb_grpc.PersonalisationServiceStub(foreign).Enrol(pb.EnrolRequest(), timeout=HANGS_S)
                    assert (await rig.refusal(call))[0] is grpc.StatusCode.UNAVAILABLE

    asyncio.run(scenario())


def test_files_that_are_no_certificates_are_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.sign("localhost")
    other, _ = authority.sign("other")
    (tmp_path / "empty.pem").touch()
    for wrong in (
        (other, key, None),
        (cert, cert, None),
        (cert, key, tmp_path / "empty.pem"),
        (cert, key, tmp_path / "no"),
    ):
        with pytest.raises(InvalidInput, match="TLS"):
            Certificates(*wrong)
    sound = Certificates(cert, key, authority.path)
    assert sound._now() is None
    key.write_text("nothing")
    with caplog.at_level(logging.WARNING):
        assert sound._now() is None
    assert "cannot be used yet" in caplog.text


def test_a_device_is_told_what_is_wrong_with_its_certificate(tmp_path: Path) -> None:
    cert, key = Authority(tmp_path).sign("kiosk")
    with pytest.raises(InvalidInput, match="over TLS alone"):
        open_channel("localhost:1", own=(cert, key))
    with pytest.raises(InvalidInput, match="cannot be read"):
        open_channel("localhost:1", tls=True, own=(cert, tmp_path / "none"))
    with pytest.raises(ValueError, match="both --tls-cert and --tls-key"):
        _ = CloudOptions(tls_cert=cert).own_certificate


def test_metrics_beyond_loopback_need_a_certificate_and_health_needs_none(rig: Any, tmp_path: Path) -> None:
    ours = Authority(tmp_path / "ours")
    (cert, key), (own_cert, own_key) = ours.sign("localhost"), ours.sign("prometheus")

    def scraped(port: int, own: bool) -> str:
        context = ssl.create_default_context(cafile=str(ours.path))
        if own:
            context.load_cert_chain(own_cert, own_key)
        with urlopen(f"https://localhost:{port}/metrics", context=context, timeout=HANGS_S) as reply:
            return str(reply.read().decode())

    async def scenario() -> tuple[str, int, tuple[grpc.StatusCode, str]]:
        tls = {"tls_cert": cert, "tls_key": key, "tls_client_ca": ours.path}
        listens = {"metrics_listen": "0.0.0.0:0", "health_listen": "127.0.0.1:0"}
        async with rig.running(**tls, **listens) as (server, _):
            text = await asyncio.to_thread(scraped, server.metrics_port, True)
            with pytest.raises(OSError):
                await asyncio.to_thread(scraped, server.metrics_port, False)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.health_port}", OWN_CONNECTION) as probe:
                check = health_pb2_grpc.HealthStub(probe).Check(health_pb2.HealthCheckRequest())
                other = pb_grpc.PersonalisationServiceStub(probe).Enrol(pb.EnrolRequest(), timeout=HANGS_S)
                return text, (await check).status, await rig.refusal(other)

    text, status, refused = asyncio.run(scenario())
    assert "isthmus_tls_certificate_expiry_timestamp_seconds" in text
    assert 'isthmus_tenant_calls_total{tenant="default"}' in text
    assert status == health_pb2.HealthCheckResponse.SERVING
    assert refused[0] is grpc.StatusCode.UNIMPLEMENTED


def test_metrics_are_not_served_to_everybody(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metrics beyond loopback need"):
        CloudSettings(state=tmp_path, release=tmp_path, metrics_listen="0.0.0.0:9464")
    with pytest.raises(ValueError, match="not both"):
        CloudSettings(state=tmp_path, release=tmp_path, metrics_listen="127.0.0.1:1", metrics_port=1)
