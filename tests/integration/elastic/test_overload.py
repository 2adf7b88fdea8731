"""Ten times more than the server can do: memory stays bounded, useful work goes on, and everybody is answered."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from isthmus.cloud.elastic.model.executor import Item
from isthmus.cloud.elastic.policies.by_name import DEFAULT_POLICY, make_policy
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.scheduling.profile import MachineKey, Profile
from isthmus.cloud.elastic.scheduling.query import IN_TIME
from isthmus.cloud.elastic.serve.live import LiveEngine
from isthmus.cloud.elastic.tasks.task import FloatArray, Task, TaskSpec, TaskWeights
from isthmus.proto.errors import Busy, TooLate

BATCH_S = 0.05
CAPACITY_PER_S = 100
SECONDS = 4
MAX_WAITING = 200
LATENCY_S = 1.0
"""Long, so that answers are in time on a busy machine too."""
TICK_S = 0.02


class SlowExecutor:
    """``CAPACITY_PER_S`` images a second and no more, as its profile says."""

    def run(self, items: Sequence[Item], gamma: int) -> list[FloatArray]:
        time.sleep(BATCH_S + (len(items) - 1) / CAPACITY_PER_S)
        return [np.zeros(2, np.float32) for _ in items]


def test_ten_times_too_much() -> None:
    zeros = np.zeros((2, 4), np.float32)
    task = Task(TaskSpec("t", ("no", "yes"), accuracy={0: 0.9}), TaskWeights(zeros, zeros[:, 0], {}))
    latency_s = {0: (BATCH_S, BATCH_S + 63 / CAPACITY_PER_S)}
    profile = Profile(MachineKey("p", "cpu", 1, "fp32", "m"), (0,), (1, 64), {}, latency_s)
    image = np.zeros((16, 16, 3), np.uint8)

    async def scenario() -> tuple[Counter[str], int, LiveEngine]:
        engine = Engine(profile, make_policy(DEFAULT_POLICY, profile), max_waiting=MAX_WAITING)
        live = LiveEngine(engine, SlowExecutor())
        live.plan_for(task)
        live.start()
        ends: Counter[str] = Counter()
        most_waiting = 0

        async def ask(second: int) -> None:
            try:
                answer = await live.ask(task, image, arrival_s=time.monotonic(), latency_s=LATENCY_S, utility=1.0)
            except (Busy, TooLate) as error:
                ends[type(error).__name__] += 1
            else:
                ends[f"in time, second {second}" if answer.in_time else "late"] += 1

        asked = []
        began_s = time.monotonic()
        for tick in itertools.count(1):
            second = int(time.monotonic() - began_s)
            if second >= SECONDS:
                break
            asked += [asyncio.create_task(ask(second)) for _ in range(int(10 * CAPACITY_PER_S * TICK_S))]
            most_waiting = max(most_waiting, live.waiting())
            await asyncio.sleep(max(0.0, began_s + tick * TICK_S - time.monotonic()))
        await asyncio.wait_for(asyncio.gather(*asked), 120)
        ends["asked"] = len(asked)
        left = live.waiting()
        await asyncio.to_thread(live.stop)
        assert left == 0
        return ends, most_waiting, live

    ends, most_waiting, live = asyncio.run(scenario())
    asked = ends.pop("asked")
    assert sum(ends.values()) == asked
    assert most_waiting <= MAX_WAITING
    in_time = [ends[f"in time, second {second}"] for second in range(SECONDS)]
    # Far below capacity, for busy machines. After a collapse, nothing asked in the second half would be in time.
    assert sum(in_time[SECONDS // 2 :]) > 0.1 * CAPACITY_PER_S * SECONDS / 2
    counted = live.statistics("t").outcomes
    assert sum(counted.values()) == asked - ends["Overloaded"]
    assert sum(counted.get(outcome, 0) for outcome in IN_TIME) == sum(in_time)
