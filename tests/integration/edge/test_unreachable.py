"""Addresses that are wrong in some way: the device says what to change. Real sockets, real TLS."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import grpc
import pytest

from isthmus.edge.link.over_grpc import GrpcLink, open_channel
from isthmus.edge.link.unreachable import why
from isthmus.proto.errors import Unavailable, WrongState
from tests.rigs.cloud.certificate import write_certificate


@contextmanager
def serving(credentials: grpc.ServerCredentials | None = None) -> Iterator[int]:
    """Run a gRPC server that knows no method; yield its port."""
    server = grpc.server(ThreadPoolExecutor(1))
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield port
    finally:
        server.stop(None)


def refusal(address: str, tls_ca: Path | None = None) -> str:
    link = GrpcLink(open_channel(address, tls_ca=tls_ca))
    try:
        with pytest.raises(Unavailable) as refused:
            link.enrol("kiosk", "")
    finally:
        link.close()
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "hours", "words"),
    [
        ("elsewhere.example", (-1, 1), "certificate is for another name"),
        ("localhost", (-48, -24), "certificate has expired, or this device's clock is wrong"),
        ("localhost", (24, 48), "certificate is not valid yet, or this device's clock is wrong"),
    ],
)
def test_a_certificate_that_does_not_hold(tmp_path: Path, name: str, hours: tuple[int, int], words: str) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    write_certificate(cert, key, name_in_it=name, hours=hours)
    with serving(grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])) as port:
        assert words in refusal(f"localhost:{port}", cert)


def test_a_certificate_of_an_unknown_authority(tmp_path: Path) -> None:
    cert, key, other = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "other.pem"
    write_certificate(cert, key)
    write_certificate(other, tmp_path / "other-key.pem")
    with serving(grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])) as port:
        assert "give the authority with --tls-ca FILE" in refusal(f"localhost:{port}", other)


def test_a_server_without_tls_and_one_of_another_kind(tmp_path: Path) -> None:
    cert = tmp_path / "cert.pem"
    write_certificate(cert, tmp_path / "key.pem")
    with serving() as port:
        assert "it does not speak TLS" in refusal(f"localhost:{port}", cert)
    with answering(lambda request: b"HTTP/1.1 505 Version Not Supported\r\nContent-Length: 0\r\n\r\n") as port:
        assert "another kind of server answers there" in refusal(f"127.0.0.1:{port}")


def test_a_grpc_server_that_is_no_cloud() -> None:
    with serving() as port:
        link = GrpcLink(open_channel(f"127.0.0.1:{port}"))
        with pytest.raises(WrongState, match="no Isthmus cloud answers there"):
            link.enrol("kiosk", "")
        link.close()


def test_nothing_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert "nothing listens at this address" in refusal(f"127.0.0.1:{unused.getsockname()[1]}")
    assert why("upstream connect error") == "the cloud cannot be reached"


@contextmanager
def answering(answer: Callable[[bytes], bytes]) -> Iterator[int]:
    """Answer the first bytes of each connection, and close it; yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(answer(connection.recv(1024)))

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


def test_calls_that_a_stopping_cloud_had_not_begun_may_be_made_again() -> None:
    all_ask = threading.Barrier(9)

    def refused(link: GrpcLink) -> str:
        all_ask.wait()
        with pytest.raises(Unavailable) as error:
            link.enrol("kiosk", "")
        return str(error.value)

    async def not_begun() -> list[str]:
        server = grpc.aio.server()
        channel = open_channel(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        await server.start()
        await asyncio.to_thread(grpc.channel_ready_future(channel).result)
        with closing(GrpcLink(channel)) as link, ThreadPoolExecutor(8) as devices:
            asked = [devices.submit(refused, link) for _ in range(8)]
            # The server learns of a first call, and of no other while its event loop stands still.
            all_ask.wait()
            time.sleep(1.0)
            await server.stop(None)
            return [await asyncio.wrap_future(each) for each in asked]

    assert "the cloud stopped before it answered" in asyncio.run(not_begun())
