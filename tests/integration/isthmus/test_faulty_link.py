"""The faulty link over real sockets: what passes, what is cut, swallowed or damaged, and its command."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from isthmus.cli import main
from isthmus.link.model import Direction, Phase
from isthmus.link.proxy import FaultyLink
from isthmus.link.script import Script

MESSAGE = bytes(range(256)) * 200


class Echo:
    """A server that sends back what it receives; ``received`` has the bytes of each connection."""

    def __init__(self) -> None:
        self.received: list[bytearray] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine = bytearray()
        self.received.append(mine)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                mine += data
                writer.write(data)
                await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def linked(script: Script) -> AsyncIterator[tuple[FaultyLink, Echo, Callable[[], object]]]:
    echo = Echo()
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    link = FaultyLink(script, "127.0.0.1", server.sockets[0].getsockname()[1])
    await link.start()
    host, port = link.address.split(":")
    try:
        yield link, echo, lambda: asyncio.open_connection(host, int(port))
    finally:
        await link.close()
        server.close()


async def exchange(connect: Callable[[], object], message: bytes = MESSAGE) -> bytes:
    """Send a message and the end of the stream; return what comes back until the connection ends."""
    reader, writer = await connect()  # type: ignore[misc]
    writer.write(message)
    writer.write_eof()
    came = bytearray()
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            came += data
    writer.close()
    return bytes(came)


def test_without_faults_everything_passes_to_the_last_byte() -> None:
    async def scenario() -> None:
        async with linked(Script()) as (link, _, connect):
            found = await asyncio.gather(*(exchange(connect) for _ in range(8)))
            assert found == [MESSAGE] * 8
            assert (link.counts.connections, link.counts.up_bytes) == (8, 8 * len(MESSAGE))
            assert link.counts.down_bytes == 8 * len(MESSAGE)

    asyncio.run(scenario())


def test_bytes_arrive_no_earlier_than_the_link_allows() -> None:
    script = Script(up=Direction((Phase(rate_bytes_s=200_000, delay_s=0.02),)))

    async def scenario() -> float:
        async with linked(script) as (link, _, connect):
            began_s = link.now_s()
            assert await exchange(connect) == MESSAGE
            return link.now_s() - began_s

    assert asyncio.run(scenario()) >= len(MESSAGE) / 200_000 + 0.02


def test_a_connection_is_cut_at_its_byte_and_the_next_is_not() -> None:
    async def scenario() -> None:
        async with linked(Script(up=Direction((Phase(cut_at_byte=(1_000,)),)))) as (link, echo, connect):
            await exchange(connect)
            assert await exchange(connect) == MESSAGE
            assert [len(each) for each in echo.received] == [1_000, len(MESSAGE)]
            assert link.counts.cut == 1

    asyncio.run(scenario())


def test_random_cuts_are_the_same_with_the_same_seed() -> None:
    async def lengths(seed: int) -> list[int]:
        script = Script(up=Direction((Phase(cut_every_bytes=30_000),)), seed=seed)
        async with linked(script) as (_, echo, connect):
            for _ in range(6):
                await exchange(connect)
            return [len(each) for each in echo.received]

    first = asyncio.run(lengths(1))
    assert first == asyncio.run(lengths(1))
    assert first != asyncio.run(lengths(2))


def test_damaged_bytes_differ_in_one_bit_at_places_that_the_seed_fixes() -> None:
    script = Script(up=Direction((Phase(corrupt_every_bytes=2_000),)), seed=5)

    async def scenario() -> bytes:
        async with linked(script) as (link, echo, connect):
            came = await exchange(connect)
            differing = [a ^ b for a, b in zip(came, MESSAGE, strict=True) if a != b]
            assert len(differing) == link.counts.damaged_bytes > 5
            assert all(each.bit_count() == 1 for each in differing)
            assert bytes(echo.received[0]) == came
            return came

    assert asyncio.run(scenario()) == asyncio.run(scenario())


def test_a_half_open_connection_swallows_and_a_new_one_works() -> None:
    async def scenario() -> None:
        async with linked(Script()) as (link, echo, connect):
            reader, writer = await connect()  # type: ignore[misc]
            writer.write(b"before")
            assert await reader.readexactly(6) == b"before"
            link.half_open()
            writer.write(b"after")
            assert await exchange(connect, b"another") == b"another"
            while link.counts.swallowed_bytes < 5:
                await asyncio.sleep(0.001)
            assert bytes(echo.received[0]) == b"before"
            assert not reader.at_eof()
            writer.close()

    asyncio.run(scenario())


class Jumping(asyncio.SelectorEventLoop):
    """A loop whose time a test lets pass: what is due by then happens at once."""

    ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s


def test_phases_cut_and_refuse_on_time() -> None:
    hour_s = 3_600.0
    script = Script(
        up=Direction((Phase(for_s=hour_s), Phase(for_s=hour_s, cut=True, refuse=True), Phase(connect_delay_s=0.01)))
    )

    async def scenario(loop: Jumping) -> None:
        async with linked(script) as (link, _, connect):
            reader, writer = await connect()  # type: ignore[misc]
            writer.write(b"x")
            assert await reader.read(1) == b"x"
            loop.ahead_s += hour_s
            with contextlib.suppress(ConnectionError):
                assert await reader.read(1) == b""
            assert await exchange(connect, b"x") == b""
            assert (link.counts.cut, link.counts.refused) == (1, 1)
            loop.ahead_s += hour_s
            assert await exchange(connect) == MESSAGE
            assert (link.counts.cut, link.counts.refused) == (1, 1)

    with asyncio.Runner(loop_factory=Jumping) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, Jumping)
        runner.run(scenario(loop))


def test_a_server_that_is_not_there() -> None:
    async def scenario() -> None:
        link = FaultyLink(Script(), "127.0.0.1", 1)
        await link.start()
        host, port = link.address.split(":")
        assert await exchange(lambda: asyncio.open_connection(host, int(port)), b"x") == b""
        await link.close()

    asyncio.run(scenario())


def test_the_command_passes_connections_on_until_it_is_ended(tmp_path: Path) -> None:
    (tmp_path / "script.json").write_text(json.dumps({"up": [{"delay_ms": 1}]}))
    options = ["--listen", "127.0.0.1:0", "--script", str(tmp_path / "script.json")]

    async def scenario() -> str:
        echo = Echo()
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "isthmus.cli", "link", *options, "--to", f"127.0.0.1:{port}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        address = (await process.stderr.readline()).decode().split()[1]
        host, listening = address.split(":")
        assert await exchange(lambda: asyncio.open_connection(host, int(listening))) == MESSAGE
        process.send_signal(signal.SIGTERM)
        out, _ = await process.communicate()
        assert process.returncode == 0
        server.close()
        return out.decode()

    assert f"up bytes: {len(MESSAGE)}" in asyncio.run(scenario())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"--listen": "0.0.0.0:0"}, "add --open-to-network"),
        ({"--listen": "nowhere"}, "expected HOST:PORT"),
        ({"--to": "127.0.0.1:0"}, "--to needs a port"),
        ({"--script": "none.json"}, "none.json: No such file"),
    ],
)
def test_wrong_options_end_in_one_line(
    options: dict[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "script.json").write_text("{}")
    given = {"--listen": "127.0.0.1:0", "--to": "127.0.0.1:9", "--script": str(tmp_path / "script.json"), **options}
    with pytest.raises(SystemExit):
        main(["link", *(word for pair in given.items() for word in pair)])
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
