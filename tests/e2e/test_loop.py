"""The whole loop in separate processes over real sockets: a cloud, and two devices that get students of their own.

The release is as small as real networks allow: what is seen here is that everything fits together, not accuracy.
"""

import contextlib
import dataclasses
import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from isthmus.data.layouts import ave
from isthmus.data.layouts.crema_d import CLASSES
from isthmus.data.layouts.listing import read_listing
from isthmus.data.synthetic.sets import MEASURED, Guest, make_ave, make_crema_d
from isthmus.demo.cli import default_edge_python
from isthmus.demo.loop import Loop
from isthmus.demo.outcome import WAYS, ClientOutcome, Spoken
from isthmus.demo.processes import Family
from isthmus.proto.convert_student import manifest_from_bytes
from isthmus.proto.messages import Stage
from tests.rigs.distill.trained import RATIOS, Trained, tiny_loop_recipe, train_release
from tests.rigs.generation.llama import save_tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

CORRECTIONS = 2
RELEASES = sorted((Path(__file__).resolve().parents[1] / "golden" / "releases").glob("*.whl"))


@dataclasses.dataclass(frozen=True)
class Ran:
    clients: tuple[ClientOutcome, ...]
    public_clips: int
    spoken: Mapping[str, Spoken]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("release")
    data = root / "data"
    guests = [Guest((0, 1, 2, 3, 4, 5), 2), Guest((1, 3, 5), 4)]
    make_crema_d(data, actors=8, takes=1, seed=0, difficulty=0.3, people=MEASURED, guests=guests, progress=False)
    listing = read_listing(data)
    return train_release(root / "release", data, tiny_loop_recipe(listing.classes))


@pytest.fixture(scope="module")
def ran(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    root = tmp_path_factory.mktemp("loop")
    (root / "isthmus").mkdir()  # as beside a clone: it must not take the package's place in the processes
    with contextlib.chdir(root), Family(root / "logs") as family:
        loop = Loop(
            family,
            root / "run",
            trained.release,
            cloud_python=Path(sys.executable),
            edge_python=default_edge_python(),
            seed=0,
            shares_state=True,
        )
        loop.disclose(trained.data, trained.clients)
        loop.personalise(trained.data, trained.clients, RATIOS)
        made = loop.correct(trained.data, trained.clients, trained.label_of, count=CORRECTIONS)
        clients = loop.outcomes(made, RATIOS)
        save_tiny_llama(root / "words")
        spoken = loop.speak(root / "words", tuple(made))
        assert loop.cloud.process.poll() is None
    assert loop.cloud.process.returncode == 0, loop.cloud.last_line()
    return Ran(clients, trained.public_clips, spoken)


def test_both_devices_got_a_student_of_their_own(ran: Ran) -> None:
    assert [client.name for client in ran.clients] == ["1009", "1010"]
    assert [client.own_classes for client in ran.clients] == [
        ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG"),
        ("HAP", "FEA", "ANG"),
    ]
    for client in ran.clients:
        assert Stage.DISTILLING.value in client.cloud_seconds
        assert 0 < sum(client.selected_per_class) <= ran.public_clips


def test_every_test_clip_was_answered_in_every_way(ran: Ran) -> None:
    for client in ran.clients:
        assert len(client.answering) == 5 + len(RATIOS), "two students as they are and for their user; corrections"
        assert all(way.clips == client.test_clips > 0 for way in client.answering)
        by_cloud = [way for way in client.answering if way.bytes_up > 0]
        assert len(by_cloud) == len(RATIOS)
        assert all(way.median_ms is not None and way.median_ms > 0 for way in by_cloud)
        for way in WAYS:
            assert None not in client.tested.predicted[way]


def test_devices_learn_from_selection_clips_alone(ran: Ran, trained: Trained) -> None:
    for client in ran.clients:
        corrected = [one.clip for one in client.corrections]
        assert len(set(corrected)) == len(corrected) == CORRECTIONS
        assert not set(corrected) & set(client.tested.names)
        assert set(corrected) <= set(trained.clients[client.name])
        assert all(one.label == trained.label_of[one.clip] for one in client.corrections)
        assert f"learned from {client.selection_clips} of your clips" in client.learned[0]


def test_what_left_the_device_is_small_and_no_prototype_is_under_the_floor(ran: Ran) -> None:
    for client in ran.clients:
        assert client.min_cluster >= 3
        assert client.sizes_K.min() >= 3
        assert client.sizes_K.sum() == client.selection_clips
        np.testing.assert_allclose(client.prototypes_KC.sum(axis=1), 1, atol=1e-5)
        ratio_1, ratio_2 = (way.bytes_up for way in client.answering if way.bytes_up > 0)
        assert ratio_2 < 0.55 * ratio_1 < 0.55 * client.raw_bytes_per_clip
        assert client.prototype_bytes < client.raw_bytes_per_clip


def test_the_language_model_replies_to_each_client_and_hears_how_they_feel(ran: Ran) -> None:
    assert set(ran.spoken) == {client.name for client in ran.clients}
    for spoken in ran.spoken.values():
        assert spoken.reply
        assert spoken.sent is not None and set(spoken.sent) == {"class", "probability"}
        assert spoken.sent["class"] in CLASSES


def test_the_devices_ran_without_torch_where_their_environment_is_there() -> None:
    python = default_edge_python()
    if python == Path(sys.executable):
        pytest.skip("no .venv-edge beside this environment: 'make install-edge' makes it")
    code = "import importlib.util as u, isthmus.edge.commands.edge; assert u.find_spec('torch') is None"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


def test_the_loop_in_ave_s_layout_goes_on_without_a_person_model(tmp_path: Path) -> None:
    """Videos name no person, so nothing is learned of voice and face, and nothing is asked."""
    data = tmp_path / "data"
    make_ave(data, classes=3, takes=7, seed=0, difficulty=0.3, progress=False)
    lists = {name: (data / name).read_text().splitlines(keepends=True) for name in (ave.PRIVATE_LIST, "trainSet.txt")}
    moved = lists["trainSet.txt"][:12]  # a tenth of so few videos would leave clients without clips
    (data / ave.PRIVATE_LIST).write_text("".join([*lists[ave.PRIVATE_LIST], *moved]))
    (data / "trainSet.txt").write_text("".join(lists["trainSet.txt"][12:]))
    trained = train_release(tmp_path / "release", data, tiny_loop_recipe(read_listing(data).classes, "ave"))
    with Family(tmp_path / "logs") as family:
        loop = Loop(
            family,
            tmp_path / "run",
            trained.release,
            cloud_python=Path(sys.executable),
            edge_python=default_edge_python(),
            seed=0,
        )
        loop.disclose(trained.data, trained.clients)
        loop.personalise(trained.data, trained.clients, (1.0,))
        made = loop.correct(trained.data, trained.clients, trained.label_of)
        clients = loop.outcomes(made, (1.0,))
    assert [client.name for client in clients] == ["client_1", "client_2"]
    for client in clients:
        assert client.corrections == client.learned == ()
        assert None not in client.tested.predicted["without_labels"]
        assert client.tested.predicted["with_corrections"] == client.tested.predicted["without_labels"]


@pytest.fixture(params=RELEASES, ids=lambda path: path.name.split("-")[1])
def released(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """An earlier version and an interpreter that has it, with the libraries that are here.

    Not those of the device's environment, because earlier devices needed more: 0.1.0 needs SciPy.
    """
    wheel: Path = request.param
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    python = tmp_path / "python"
    # Neither the checkout in the working folder nor an editable installation comes before the wheel.
    python.write_text(f'#!/bin/sh\nPYTHONSAFEPATH=1 PYTHONPATH={site} exec {sys.executable} "$@"\n')
    python.chmod(0o700)
    return wheel.name.split("-")[1], python


def test_a_device_of_an_earlier_release_completes_the_loop(
    released: tuple[str, Path], trained: Trained, tmp_path: Path
) -> None:
    """The words are those that the earlier release understands: they stay as they are when ours change.

    The release has a person model, so the manifests of both students hold a part that this device does not know.
    """
    version, python = released
    assert (trained.release / "base" / "person.pb").stat().st_size > 0
    with Family(tmp_path / "logs") as family:
        loop = Loop(
            family, tmp_path / "run", trained.release, cloud_python=Path(sys.executable), edge_python=python, seed=0
        )
        (tmp_path / "clips.txt").write_text("".join(f"{name}\n" for name in trained.clients["1009"]))
        told = family.start("version", [python, "-m", "isthmus.cli", "--version"], output=tmp_path / "version")
        family.wait(told, timeout_s=600)
        words = ["edge", "run", "--ratios", "1,2", "--once", "--no-guard", "--cloud", loop.address]
        words += ["--data", trained.data, "--clips", tmp_path / "clips.txt"]
        words += ["--state", tmp_path / "device", "--report", tmp_path / "report.json"]
        device = family.start("device", [python, "-m", "isthmus.cli", *words], env={"OMP_NUM_THREADS": "1"})
        family.wait(device, timeout_s=1500)
    assert (tmp_path / "version").read_text().split() == ["isthmus", version]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failure"] == ""
    assert report["students"]["final"] not in ("", report["students"]["base"])
    assert report["job"]["stage"] == "ready"
    kept = [path.read_bytes() for path in (tmp_path / "device").glob("students/versions/*/manifest.pb")]
    assert len(kept) == 2
    assert all(manifest_from_bytes(content).centred is not None for content in kept), "kept whole, because it is signed"
    assert len(report["predictions"]) == len(report["clips"]["test"]) > 0
    for clip in report["predictions"]:
        assert None not in (clip["before"], clip["local"], clip["cloud"]["1"], clip["cloud"]["2"])
