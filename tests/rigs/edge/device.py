"""A device over a cloud in memory, with a clock of its own."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.data.transforms import InputSpec
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.agent.runtime import Runtime
from isthmus.edge.capture.clip_plan import ClipPlan
from isthmus.edge.link.interface import MemoryCloud, MemoryLink
from isthmus.edge.student.encoder import check_student
from isthmus.proto.messages import StudentManifest


def load_test(folder: Path, manifest: StudentManifest) -> None:
    """Run the student on a silent clip in this process: the child process of a real trial takes half a second."""
    spec = InputSpec.from_json(manifest.input_spec_json)
    spectrogram_FT = np.zeros((spec.spectrogram_bins, spec.spectrogram_columns), np.float32)
    frames_KCHW = np.zeros((spec.frames_used, 3, spec.frame_px, spec.frame_px), np.float32)
    check_student(folder, manifest, [(spectrogram_FT, frames_KCHW)])


class Clock:
    """A clock that advances by sleeping, and a little per reading. Raises TimeoutError after ``most_sleeps``."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.most_sleeps = math.inf
        self.slept: list[float] = []

    def __call__(self) -> float:
        self.now_s += 1e-4
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if len(self.slept) > self.most_sleeps:
            raise TimeoutError(f"over {self.most_sleeps} pauses")
        self.now_s += seconds


def device(
    folder: Path, cloud: MemoryCloud, plan: ClipPlan, *, link: MemoryLink | None = None, **changes: Any
) -> tuple[Runtime, DeviceState, Clock]:
    clock, state = Clock(), DeviceState(folder)
    # These students are random: the guard would accept or refuse them by chance. It has tests of its own.
    config = replace(changes.pop("config", RunConfig("kiosk", seed=1)), guard=changes.pop("guard", False))
    runtime = Runtime(
        config,
        state,
        link or MemoryLink(cloud),
        plan.selection,
        clock=clock,
        sleep=changes.pop("sleep", clock.sleep),
        jitter=lambda: 0.5,
        trial=changes.pop("trial", load_test),
        **changes,
    )
    return runtime, state, clock
