"""Replicas that are kept running: whatever their end or their start raises, they come back, and none is left over."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from isthmus.cloud.generation.serve.carrier import Lost, Response
from isthmus.cloud.generation.serve.settings import GenerationSettings
from isthmus.cloud.replicas import hosted
from isthmus.cloud.replicas.hosted import Hosted, Opening
from isthmus.cloud.replicas.opening import Alike
from isthmus.cloud.replicas.process import _end, _said
from isthmus.proto.errors import InvalidInput

WAIT_S = 600.0


@dataclass(frozen=True)
class Said:
    """A response with this body."""

    body: bytes
    status: int = 200

    async def chunks(self) -> AsyncIterator[bytes]:
        yield self.body


class Replica:
    """A replica that answers until somebody ends it. Its answer is the name of its model."""

    def __init__(self, model: str = "m", *, ending: Exception | None = None) -> None:
        self.model, self._ending = model, ending
        self.ends = 0
        self._gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def carrier(self) -> "Replica":
        return self

    @property
    def pid(self) -> int:
        return 1

    def die(self) -> None:
        self._gone.set_result("killed")

    async def gone(self) -> str:
        return await asyncio.shield(self._gone)

    async def end(self) -> None:
        self.ends += 1
        if self._ending is not None:
            raise self._ending

    async def close(self) -> None:
        await self.end()

    @asynccontextmanager
    async def exchange(
        self, method: str, path: str, *, headers: Mapping[str, str], body: bytes | None, within_s: float | None = None
    ) -> AsyncIterator[Response]:
        yield Said(json.dumps({"model": self.model}).encode())


@dataclass
class Starts:
    """Gives what is in ``coming``, one after the other, or raises it. Then it never answers."""

    coming: list[Replica | Exception]
    given: list[Replica] = field(default_factory=list)

    async def __call__(self, opening: Opening | None = None) -> Replica:
        if not self.coming:
            await asyncio.Event().wait()
        found = self.coming.pop(0)
        if isinstance(found, Exception):
            raise found
        self.given.append(found)
        return found


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), WAIT_S)

    asyncio.run(bounded())


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosted, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(hosted, "MOST_PAUSE_S", 0.001)


def test_whatever_an_end_or_a_start_raises_the_replica_comes_back() -> None:
    async def scenario() -> None:
        first, second = Replica(ending=RuntimeError("a library's own")), Replica()
        starts = Starts([first, InvalidInput("no room"), KeyError("unforeseen"), second])
        host = Hosted("replica-1", starts)
        await host.open()
        first.die()
        await until(lambda: host.pid is None)
        with pytest.raises(Lost) as refused:
            async with host.exchange("GET", "/health", headers={}, body=None):
                pytest.fail("there is no replica")
        assert refused.value.full, "the request may wait for it"
        await until(lambda: len(starts.given) == 2 and host.pid is not None)
        async with host.exchange("GET", "/health", headers={}, body=None) as response:
            assert response.status == 200
        await host.close()
        assert (first.ends, second.ends) == (1, 1)

    run(scenario)


def test_one_that_does_not_answer_after_its_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosted, "START_S", 0.01)

    async def scenario() -> None:
        with pytest.raises(InvalidInput, match=r"replica-1 did not answer within 0\.01 s of its start"):
            await Hosted("replica-1", Starts([])).open()

    run(scenario)


def test_a_replica_with_other_weights_is_refused_also_when_it_is_started_again() -> None:
    async def scenario() -> None:
        first, other, same = Replica("m"), Replica("other"), Replica("m")
        starts = Alike(Starts([first, other, same]))
        opening = Opening(GenerationSettings(Path("model"), executor="process"), "key")
        assert await starts.start(opening) is first
        with pytest.raises(InvalidInput, match="copy model to all machines again"):
            await starts.start(opening)
        assert other.ends == 1
        assert await starts.start(opening) is same and same.ends == 0

    run(scenario)


def test_a_process_that_does_not_end_is_killed_if_nobody_waits_for_its_end() -> None:
    async def scenario() -> None:
        deaf = (sys.executable, "-c", "import time; time.sleep(1_000)")
        process = await asyncio.create_subprocess_exec(*deaf, stdin=asyncio.subprocess.PIPE)
        ending = asyncio.create_task(_end(process))
        await asyncio.sleep(0)
        ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending
        assert await process.wait() == -9

    run(scenario)


@pytest.mark.parametrize("line", [b"", b'{"port": 80', b"[1]\n", b"\xff\n"])
def test_half_a_line_says_nothing(line: bytes) -> None:
    assert _said(line) == {}
