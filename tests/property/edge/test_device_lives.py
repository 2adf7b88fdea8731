"""Lives of a device against a model: links, restarts, full disks, damaged files and hostile clouds, in any order.

Whatever happens: no round of a job gets two different uploads, the rounds and the budget that the person allows are
kept, clips are answered whenever a sound student is there, and once the world is well again the device finishes.
"""

import os
import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from isthmus.data.clip import ClipRef, DecodedClip
from isthmus.data.media import decode
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.inference import answer_locally
from isthmus.edge.agent.progress import Observer
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.agent.runtime import Runtime, Stopped
from isthmus.edge.behaviour.state import Phase
from isthmus.edge.capture.sources import Taken
from isthmus.edge.link.interface import MemoryCloud, MemoryLink
from isthmus.edge.student.encoder import StudentEncoder, encode
from isthmus.proto.convert import prototypes_to_pb
from isthmus.proto.errors import Busy, Corrupt, Internal, IsthmusError, NotYours, StorageFull, Unavailable
from isthmus.proto.messages import JobStatus, Prototypes, Stage
from tests.rigs.edge.device import Clock, load_test

MEMORY = Path("/dev/shm")
"""A folder in memory, if the system has one: the outbox waits for the disk at every step."""

ROUNDS = 2
NOISE = 1.0
BUDGET = 5.0
SELECTION = tuple(ClipRef(f"clip-{number}", None, None, None, None) for number in range(6))


naps = st.integers(0, 4)


class Killed(Exception):
    """The process died."""


class Disk(DeviceState):
    """A state folder on a disk that can be full."""

    full = False

    def _write(self, name: str, content: dict[str, Any]) -> None:
        if self.full:
            raise StorageFull("the disk is full")
        super()._write(name, content)


class HostileLink(MemoryLink):
    """A link that fails at will, into a cloud that may have forgotten its jobs. It records every upload."""

    def __init__(self, cloud: MemoryCloud, world: "Lives") -> None:
        super().__init__(cloud)
        self.world = world

    def _check_reachable(self) -> None:
        super()._check_reachable()
        if self.world.failures and self.world.chance.random() < 0.3:
            raise self.world.chance.choice(self.world.failures)

    def start_personalisation(
        self, idempotency_key: str, prototypes: Prototypes, *, rounds: int, seed: int
    ) -> JobStatus:
        status = super().start_personalisation(idempotency_key, prototypes, rounds=rounds, seed=seed)
        self.world.uploaded(status.job_id, 0, prototypes)
        self._check_reachable()  # The answer can be lost.
        return status

    def upload_prototypes(self, job_id: str, round: int, prototypes: Prototypes) -> JobStatus:
        status = super().upload_prototypes(job_id, round, prototypes)
        self.world.uploaded(job_id, round, prototypes)
        self._check_reachable()
        return status


class Lives(RuleBasedStateMachine):
    students: Any = None

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="isthmus-lives-", dir=MEMORY if MEMORY.is_dir() else None))
        self.device = Disk(self.folder)
        self.cloud: MemoryCloud = self.students.cloud()
        self.honest = self.cloud.script
        self.clock = Clock()
        self.chance = random.Random(0)
        self.failures: list[IsthmusError] = []
        self.uploads: dict[tuple[str, int], bytes] = {}
        self.payloads: set[bytes] = set()
        self.allowed = ROUNDS

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            try:
                self.end_well()
            finally:
                shutil.rmtree(self.folder, ignore_errors=True)

    def uploaded(self, job_id: str, round: int, prototypes: Prototypes) -> None:
        payload = prototypes_to_pb(prototypes).SerializeToString()
        assert self.uploads.setdefault((job_id, round), payload) == payload, "a round was sent twice, differently"
        self.payloads.add(payload)

    def live(self, naps: int, *, deaths_at: int | None = None, again: bool = False, patient: bool = False) -> None:
        """Run one process until it ends, has slept ``naps`` times, or dies at its n-th action.

        ``again``: if the device is serving, the person asks for another personalisation.
        """
        slept = performed = 0

        def sleep(seconds: float) -> None:
            nonlocal slept
            slept += 1
            self.clock.sleep(seconds)
            if slept > naps:
                raise Killed

        def act(stage: str) -> None:
            nonlocal performed
            performed += 1
            if performed == deaths_at:
                raise Killed

        config = RunConfig("kiosk", seed=1, rounds=ROUNDS, guard=False, epsilon_budget=BUDGET)
        config = replace(config, choices=replace(config.choices, noise=NOISE))
        try:
            runtime = Runtime(
                config,
                self.device,
                HostileLink(self.cloud, self),
                SELECTION,
                observer=Observer(on_stage=act),
                clock=self.clock,
                sleep=sleep,
                jitter=self.chance.random,
                trial=load_test,
            )
        except (Corrupt, StorageFull):
            return  # One line for a person; the next start tries again.
        try:
            if again and runtime.state.phase is Phase.SERVE:
                self.allowed += ROUNDS
                runtime.personalise_again()
            runtime.run(patient=patient)
        except (Killed, Stopped, StorageFull):
            pass
        finally:
            runtime.close()

    @rule(naps=naps, deaths_at=st.none() | st.integers(1, 12), again=st.booleans())
    def a_process_lives(self, naps: int, deaths_at: int | None, again: bool) -> None:
        self.live(naps, deaths_at=deaths_at, again=again)

    @rule()
    def a_patient_process_lives(self) -> None:
        self.live(8, patient=True)

    @rule(reachable=st.sampled_from([True, True, False]), naps=naps)
    def the_link_changes(self, reachable: bool, naps: int) -> None:
        self.cloud.reachable = reachable
        self.live(naps)

    @rule(full=st.booleans(), naps=naps)
    def the_disk_changes(self, full: bool, naps: int) -> None:
        self.device.full = full
        self.live(naps)

    @rule(seed=st.integers(0, 99), kinds=st.lists(st.sampled_from([Busy, Internal, Unavailable, NotYours]), max_size=3))
    def the_cloud_fails_now_and_then(self, seed: int, kinds: list[type[IsthmusError]]) -> None:
        self.chance = random.Random(seed)
        self.failures = [kind("as it pleases") for kind in kinds]
        self.live(6, again=True)

    @rule(
        kind=st.sampled_from(["honest", "greedy", "failed", "nothing", "nameless", "foreign"]),
        naps=naps,
        deaths_at=st.none() | st.integers(3, 12),
    )
    def the_cloud_changes_its_mind(self, kind: str, naps: int, deaths_at: int | None) -> None:
        asks = [JobStatus("", Stage.AWAITING_PROTOTYPES, round, 9, student_id="interim") for round in range(1, 9)]
        self.cloud.script = {
            "honest": self.honest,
            "greedy": tuple(asks),
            "failed": (JobStatus("", Stage.FAILED, error="no"),),
            "nothing": (JobStatus("", Stage.DISTILLING),),
            "nameless": (JobStatus("", Stage.READY),),
            "foreign": (JobStatus("", Stage.READY, student_id="never"),),
        }[kind]
        self.live(naps, deaths_at=deaths_at, again=True)

    @rule(naps=naps)
    def the_cloud_forgets_its_jobs(self, naps: int) -> None:
        # New jobs get new names, as a cloud that was set up again would give them.
        self.cloud.jobs = {f"forgotten-{key}": f"gone-{name}" for key, name in self.cloud.jobs.items()}
        self.live(naps)

    @rule(seed=st.integers(0, 99))
    def a_file_of_the_student_in_use_is_damaged(self, seed: int) -> None:
        current = self.folder / "students" / "current"
        if current.is_dir():
            chance = random.Random(seed)
            path = chance.choice(sorted(current.resolve().iterdir()))
            content = bytearray(path.read_bytes())
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            path.write_bytes(bytes(content))
            self.allowed += ROUNDS  # If the cloud does not have the student any more, the device starts over.

    @rule(naps=naps)
    def the_identity_is_lost(self, naps: int) -> None:
        (self.folder / "credentials.json").unlink(missing_ok=True)
        self.allowed += 1  # If the student is damaged too, round 0 is made by another one.
        self.live(naps)

    @invariant()
    def the_person_is_obeyed(self) -> None:
        if not hasattr(self, "folder"):
            return
        ledger = self.device.ledger()
        assert sum(entry.epsilon or 0.0 for entry in ledger) <= BUDGET + 1e-9
        assert len(self.payloads) <= len(ledger), "what was sent is in the ledger"
        assert len(self.payloads) <= self.allowed, "no personalisation makes more uploads than the person allows"
        assert max((entry.round for entry in ledger), default=0) < ROUNDS

    @invariant()
    def clips_are_answered(self) -> None:
        if not hasattr(self, "folder"):
            return
        device, state = self.device, self.device.agent()
        enrolment = device.enrolment()
        if enrolment is None or not state.active_id:
            return
        folder = self.folder / "students" / "versions" / state.active_id
        sound = {(state.active_id, path.name): path.read_bytes() for path in folder.glob("*.onnx")}
        if sound and all(self.cloud.files[key] == content for key, content in sound.items()):
            spec = self.students.spec
            taken = Taken(SELECTION[0], decoded(SELECTION[0], spec), 0.0)
            encoder = StudentEncoder(folder)
            answer = answer_locally(encoder, encode(encoder, taken, spec, self.clock).features, self.clock)
            assert answer.predicted is not None

    def end_well(self) -> None:
        """The world is well again: the device finishes within a few starts, or says that the budget is spent."""
        self.cloud.reachable, self.device.full, self.failures = True, False, []
        self.cloud.script = self.honest
        for _ in range(4):
            self.live(30)
        state = self.device.agent()
        spent = sum(entry.epsilon or 0.0 for entry in self.device.ledger())
        done = state.phase is Phase.SERVE and not state.failure and not state.repair_id
        over = "budget" in state.failure or "are allowed" in state.failure
        assert done or over, (state, spent)


def decoded(ref: ClipRef, spec: Any) -> DecodedClip:
    rng = np.random.default_rng(len(ref.name) + ord(ref.name[-1]))
    return DecodedClip(
        spectrogram_FT=rng.random((spec.spectrogram_bins, spec.spectrogram_columns), np.float32),
        frames_KHWC=rng.integers(0, 255, (spec.frames_stored, spec.stored_px, spec.stored_px, 3), np.uint8),
    )


def test_lives(students: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "decode", decoded)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # A killed process loses nothing that was written.
    monkeypatch.setattr(Lives, "students", students)
    run_state_machine_as_test(Lives, settings=settings(max_examples=20, stateful_step_count=12, deadline=None))
