"""A release in a running cloud: two servers and a worker on one database, two devices that are always answered."""

import asyncio
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from isthmus.cloud.commands.cloud import app
from isthmus.cloud.personalise import job_rows
from isthmus.cloud.store import audit, releases
from isthmus.cloud.store.database import Database
from isthmus.distill.release import Release
from isthmus.distill.student.base import make_base
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.release_watch import follow
from isthmus.edge.agent.runtime import RunConfig, Runtime
from isthmus.edge.behaviour.moving import Move
from isthmus.edge.behaviour.state import Phase
from isthmus.edge.capture.clip_plan import ClipPlan
from isthmus.edge.link.over_grpc import GrpcLink, open_channel
from isthmus.proto.codec import pack_frame
from isthmus.proto.messages import FeatureFrame, Features, NumberType
from tests.rigs.cloud.postgres import running_cluster
from tests.rigs.project.patience import HANGS_S, until

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def first_release(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny release with a base student that runs."""
    root = tmp_path_factory.mktemp("first") / "release"
    shutil.copytree(tiny_release, root)
    shutil.rmtree(root / "base")
    return _exported(root, 1)


@pytest.fixture(scope="module")
def second_release(first_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another training of the same base student."""
    root = tmp_path_factory.mktemp("second") / "release"
    shutil.copytree(first_release, root)
    shutil.rmtree(root / "base")
    return _exported(root, 2)


def _exported(root: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    path = Release.open(root).student_path(0)
    save_file(
        {
            name: value + 0.05 * torch.randn_like(value.float()).to(value.dtype)
            for name, value in load_file(path).items()
        },
        path,
    )
    make_base(Release.open(root), torch.device("cpu"))
    return root


class Answered:
    """A thread that asks the heads of one student again and again. ``failures`` is what was not answered."""

    def __init__(self, runtime: Runtime, port: int) -> None:
        self.student_id = runtime.state.active_id
        self.width = runtime.enrolment.feature_width
        self.failures: list[str] = []
        self.count = 0
        self._link = GrpcLink(open_channel(f"127.0.0.1:{port}"))
        self._link.authenticate(runtime.enrolment.token)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def _ask(self) -> None:
        features = Features(np.ones(self.width, np.float32), np.ones(self.width, np.float32))
        frame = pack_frame(FeatureFrame(features, 1.0, NumberType.FP32))
        while not self._stop.wait(0.02):
            try:
                session = self._link.open_infer(self.student_id, timeout_s=HANGS_S)
                reply = session.ask(1, frame, timeout_s=HANGS_S)
                session.close()
                if reply.probabilities_C is None:
                    raise AssertionError(reply.error_message)
                self.count += 1
            except Exception as error:
                self.failures.append(repr(error))

    def __enter__(self) -> "Answered":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(HANGS_S)
        self._link.close()


@contextmanager
def living(folder: Path, port: int, plan: ClipPlan) -> Iterator[Runtime]:
    """A device that has personalised on what it was offered. Without the guard: these students are random."""
    link = GrpcLink(open_channel(f"127.0.0.1:{port}"))
    config = RunConfig("kiosk", seed=1, rounds=1, guard=False)
    runtime = Runtime(config, DeviceState(folder), link, plan.selection, jitter=lambda: 0.0)
    with closing(runtime):
        runtime.run()
        assert (runtime.state.phase, runtime.state.failure) == (Phase.SERVE, "")
        yield runtime


def release_of(runtime: Runtime) -> str:
    return runtime.slot.installed(runtime.state.active_id).manifest.release


def test_a_few_devices_first_then_the_others_then_back_and_nothing_stops(
    rig: Any, first_release: Path, second_release: Path, plan: ClipPlan, tmp_path: Path
) -> None:
    def command(*words: str) -> str:
        done = CliRunner().invoke(app, ["release", *words])
        assert done.exit_code == 0, done.output
        return done.stdout

    def scenario(url: str, files: str, ports: tuple[int, int]) -> None:
        database = Database(url)
        stores = ("--database", url)
        (first,) = [row.release_id for row in releases.listing(database)]
        with ExitStack() as stack:
            stack.callback(database.close)
            early = stack.enter_context(living(tmp_path / "early", ports[0], plan))
            late = stack.enter_context(living(tmp_path / "late", ports[1], plan))
            asked = [stack.enter_context(Answered(each, port)) for each, port in ((early, ports[1]), (late, ports[0]))]
            former_id = early.state.active_id

            said = command(
                "publish", "--release", str(second_release), *stores, "--artefacts", files,
                "--signing-key-file", str(rig.state / "signing_key"),
            )  # fmt: skip
            second = said.split()[1]
            assert said == f"release {second} is published; it is offered to: nobody\n" and second != first
            assert follow(early) is Move.STAY, "nobody is offered it yet"

            command("offer", second, "--device", early.enrolment.device_id, *stores)
            assert (follow(early), follow(late)) == (Move.AGAIN, Move.STAY)
            assert (release_of(early), release_of(late)) == (second, first)
            job = next(job for job in job_rows.listing(database) if job.job_id == early.state.active_id)
            assert job.release_hash == second, "a worker that was started with the first release has made it"
            asked.append(stack.enter_context(Answered(early, ports[0])))
            # This device asks with its former student, too, and counts for the release with which it asked last.
            listed = [(second, "1 named", "1"), (first, "everyone", "1")]
            until(
                lambda: [tuple(line.split("\t")[:3]) for line in command("list", *stores).splitlines()][-2:] == listed
            )

            command("offer", second, "--everyone", *stores)
            assert (follow(early), follow(late)) == (Move.STAY, Move.AGAIN)
            assert release_of(late) == second

            command("withdraw", second, *stores)
            uploads = len(DeviceState(tmp_path / "early").ledger())
            assert (follow(early), follow(late)) == (Move.BACK, Move.BACK)
            assert (early.state.active_id, release_of(early), release_of(late)) == (former_id, first, first)
            assert len(DeviceState(tmp_path / "early").ledger()) == uploads, "nothing was sent to go back"
            refused = CliRunner().invoke(app, ["release", "remove", first, *stores, "--artefacts", files])
            assert refused.exit_code == 1 and "is offered to everyone: withdraw it first" in refused.stderr
            stack.enter_context(Answered(early, ports[0]))
            with living(tmp_path / "new", ports[1], plan) as new:
                assert release_of(new) == first

        for each in asked:
            assert not each.failures and each.count > 10
        done = [each.action for each in audit.listing(database) if each.subject == second]
        assert done == ["published release", "offered release", "offered release", "withdrew release"]

    async def served(url: str) -> None:
        files = str(tmp_path / "files")
        settings = {"database": url, "artefacts": files, "release": first_release, "watch_interval_s": 0.05}
        other = type(rig)(rig.release, tmp_path / "other")
        async with rig.running(workers=1, worker_threads=1, **settings) as (one, _):
            key = rig.state / "signing_key"
            async with other.running(signing_key_file=key, **settings) as (two, _):
                await asyncio.to_thread(scenario, url, files, (one.port, two.port))

    with running_cluster() as cluster, cluster.database() as database:
        asyncio.run(served(database.url.render_as_string(hide_password=False)))
