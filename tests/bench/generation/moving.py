"""How long a request that moves is at no server, and its client without text, by its blocks and by its tokens alone.

    python -m tests.bench.generation.moving --model smollm2 --moves 8 --out moving.json

Two servers of ours and a front run in this process, and talk over loopback. A request goes back and forth while it
answers. The largest gap between two pieces of text is what its client sees; a step's median gap is beside it.
"""

import argparse
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai

from isthmus.cloud.generation.serve.host import open_generation
from isthmus.cloud.generation.serve.relay import Relay
from isthmus.cloud.generation.serve.relocation import Arrived
from isthmus.cloud.generation.serve.settings import GenerationSettings
from tests.bench.harness import Report, Spread, shown
from tests.rigs.generation.llama import serving_http
from tests.rigs.generation.replicas import serving_relay

KEY = "bench"
PIECES_PER_MOVE = 12


def moved(relay: Relay, client: openai.OpenAI, urls: list[str], prompt: str, moves: int, rate: float) -> dict[str, Any]:
    """Moves one request back and forth; ``rate`` is the bytes per second that moves are planned with."""
    found: list[Arrived] = []
    mover: Any = relay._mover
    move = mover.move

    async def noted(*asked: Any) -> Arrived:
        mover.bytes_per_s = rate
        arrived: Arrived = await move(*asked)
        found.append(arrived)
        return arrived

    mover.move = noted
    stream = client.completions.create(
        model="words", prompt=prompt, max_tokens=PIECES_PER_MOVE * (moves + 2), temperature=1.0, seed=1, stream=True
    )
    times_s, at = [], 0
    for piece, _ in enumerate(stream, 1):
        times_s.append(time.perf_counter())
        if piece % PIECES_PER_MOVE == 0 and piece // PIECES_PER_MOVE <= moves:
            (relayed,) = relay._open.values()
            assert relayed.task is not None
            loop = relayed.task.get_loop()
            loop.call_soon_threadsafe(lambda at=at: relay.drain(urls[1 - at], draining=False))  # type: ignore[misc]
            loop.call_soon_threadsafe(lambda at=at: relay.drain(urls[at]))  # type: ignore[misc]
            at = 1 - at
    mover.move = move
    gaps_s = sorted(later - earlier for earlier, later in pairwise(times_s))
    return {
        "how": "blocks" if rate > 1 else "tokens",
        "moves": len(found),
        "by_blocks": sum(each.by_blocks for each in found),
        "pause_s": Spread.of([each.pause_s for each in found]).to_json(),
        "largest_gap_s": gaps_s[-1],
        "median_gap_s": gaps_s[len(gaps_s) // 2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--number-type", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--words", type=int, default=200, help="Words of the prompt.")
    parser.add_argument("--moves", type=int, default=8)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    settings = GenerationSettings(asked.model, number_type=asked.number_type, max_tokens=1_000)
    report = Report("moving", {"model": asked.model.name, "number_type": asked.number_type, "words": asked.words})
    prompt = "Tell me of the sea, and of an island between two shores. " * (asked.words // 12)
    with ExitStack() as stack:
        urls = [stack.enter_context(serving_http(open_generation(settings), move_key=KEY)) for _ in range(2)]
        relay, url = stack.enter_context(serving_relay(urls, move_key=KEY, context=2_048, clock=time.monotonic))
        client = stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600))
        for rate in (1e12, 1.0):
            report.rows.append(moved(relay, client, urls, prompt, asked.moves, rate))
            for each in urls:
                relay._front.drain(urls.index(each), draining=False)
    columns: dict[str, Any] = {
        "how": lambda row: row["how"],
        "moves": lambda row: f"{row['by_blocks']} of {row['moves']} by blocks",
        "pause, ms": lambda row: shown(row["pause_s"], 1e3),
        "largest gap, ms": lambda row: f"{1e3 * row['largest_gap_s']:.0f}",
        "median gap, ms": lambda row: f"{1e3 * row['median_gap_s']:.0f}",
    }
    report.finish(columns, asked.out)


if __name__ == "__main__":
    main()
