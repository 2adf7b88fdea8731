"""One contract for releases on every pair of stores: what is published, offered, withdrawn, removed and used."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.cloud.offers.offer import Offer
from isthmus.cloud.personalise import job_rows, students
from isthmus.cloud.personalise.job import Failed
from isthmus.cloud.releases import files
from isthmus.cloud.releases.catalogue import Catalogue, offer_to, withdraw
from isthmus.cloud.releases.copies import Copies
from isthmus.cloud.store import audit, devices, releases
from isthmus.cloud.store import students as student_rows
from isthmus.cloud.store.releases import ReleaseRow
from isthmus.proto.errors import InvalidInput, Unavailable, WrongState
from isthmus.proto.messages import SignedManifest, Stage
from tests.rigs.cloud.jobs import Bench, CountedLearning

DEVICES = tuple(f"{number:016x}" for number in range(200))


def add(bench: Bench, release_id: str, folder: Path | None = None) -> Offer:
    """Publish another release of the same classes, with the files of ``folder``."""
    offer = replace(bench.offer, release_hash=release_id)
    found = {}
    if folder is not None:
        found = files.described(folder, sorted(path for path in folder.rglob("*") if path.is_file()))
        files.store(bench.shelf.artefacts, release_id, folder, found)
    assert releases.put(bench.database, ReleaseRow(offer, found, folder is not None, 5.0))
    return offer


def test_a_few_devices_first_then_the_others_and_back(bench: Bench) -> None:
    other = Catalogue(bench.on_another_machine(bench.folder / "other").database) if bench.database.shared else None
    add(bench, "second")

    def offered(catalogue: Catalogue) -> set[str]:
        return {device for device in DEVICES if catalogue.offered(device).offer.release_hash == "second"}

    steps = []
    for share, named in ((0.0, DEVICES[:1]), (0.1, DEVICES[:1]), (0.5, ()), (1.0, ())):
        offer_to(bench.database, "second", share, named, 6.0)
        steps.append(offered(bench.catalogue))
        assert other is None or offered(other) == steps[-1], "another server agrees at once"
    assert steps[0] == {DEVICES[0]}
    assert 5 < len(steps[1]) < 40 < len(steps[2]) < len(steps[3]) == len(DEVICES)
    assert steps[1] - {DEVICES[0]} < steps[2]
    withdraw(bench.database, "second", 7.0)
    assert offered(bench.catalogue) == set() and releases.is_withdrawn(bench.database, "second")
    offer_to(bench.database, "second", 1.0, (), 8.0)
    assert len(offered(bench.catalogue)) == len(DEVICES) and not releases.is_withdrawn(bench.database, "second")
    offer_to(bench.database, "release", 1.0, (), 9.0)
    assert offered(bench.catalogue) == set(), "the former one is offered again"
    said = [
        (each.action, each.subject, each.detail) for each in audit.listing(bench.database) if each.subject == "second"
    ]
    assert said == [
        ("published release", "second", "from the server's --release"),
        ("offered release", "second", "to 1 named"),
        ("offered release", "second", "to 10 % and 1 named"),
        ("offered release", "second", "to 50 %"),
        ("offered release", "second", "to everyone"),
        ("withdrew release", "second", ""),
        ("offered release", "second", "to everyone"),
    ]


def test_what_is_not_published_is_not_offered(bench: Bench) -> None:
    before = releases.records(bench.database)
    with pytest.raises(InvalidInput, match="no release third is published; these are: release"):
        offer_to(bench.database, "third", 1.0, (), 6.0)
    with pytest.raises(InvalidInput, match="no release third"):
        withdraw(bench.database, "third", 6.0)
    with pytest.raises(InvalidInput, match="no release third"):
        releases.remove(bench.database, "third", 6.0)
    with pytest.raises(InvalidInput, match="--everyone"):
        withdraw(bench.database, "release", 6.0)
    assert releases.records(bench.database) == before
    with pytest.raises(WrongState, match="start again"):
        bench.catalogue.of("third")


def test_changes_at_once_lose_none_of_each_other(bench: Bench) -> None:
    names = [f"r{number}" for number in range(4)]
    folders = [bench.folder / name for name in names]
    for name, folder in zip(names, folders, strict=True):
        folder.mkdir()
        (folder / "weights.safetensors").write_text(name)
    failed: list[BaseException] = []

    def publish_and_offer(number: int) -> None:
        machine = bench.on_another_machine(bench.folder / f"machine{number}") if bench.database.shared else bench
        name, folder = names[number // 2], folders[number // 2]  # each release by two operators
        try:
            found = files.described(folder, [folder / "weights.safetensors"])
            files.store(machine.shelf.artefacts, name, folder, found)
            offer = replace(bench.offer, release_hash=name)
            releases.put(machine.database, ReleaseRow(offer, found, True, 5.0))
            offer_to(machine.database, name, 0.25, (), 6.0)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=publish_and_offer, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    records = releases.records(bench.database)
    assert sorted(each.release_id for each in records) == [*names, "release"]
    assert len({each.serial for each in records}) == len(records)
    published = [each.subject for each in audit.listing(bench.database) if each.action == "published release"]
    assert sorted(published) == [*names, "release"], "published twice at once, it is published once"


def test_servers_at_once_publish_one_base_student_and_sign_it_once(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("audio_encoder.onnx", students.HEADS_FILE):
        (folder / name).write_text(name)
    signer, student_id = bench.signer, students.base_student_id(bench.offer)
    machines = [bench.on_another_machine(bench.folder / f"m{number}") for number in range(4 * bench.database.shared)]
    machines = machines or [bench] * 4
    failed: list[BaseException] = []
    manifests: list[SignedManifest] = []
    together = threading.Barrier(len(machines))

    def start(machine: Bench, now_s: float) -> None:
        try:
            together.wait(60)
            students.publish_base(machine.shelf, signer, machine.offer, folder, now_s)
            together.wait(60)
            if machine is machines[0]:
                offer_to(machine.database, "release", 1.0, (), 6.0)
            together.wait(60)
            manifests.append(machine.described("", now_s + 100.0, signer))
        except BaseException as error:
            together.abort()
            failed.append(error)

    threads = [
        threading.Thread(target=start, args=(machine, 1_000.0 - 10 * number)) for number, machine in enumerate(machines)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(manifests) == 4 and len(set(manifests)) == 1, "no device sees a version that goes back"
    row = student_rows.get(bench.database, student_id)
    assert row is not None and row.signed == manifests[0] and row.heads_sha256 is not None
    bench.shelf.check(student_id, students.HEADS_FILE, row.heads_sha256)
    assert students.check_fetch(bench.shelf, "dev", student_id, "audio_encoder.onnx", 0).size_bytes


def test_a_half_published_release_is_nowhere_to_be_seen_and_is_continued(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "second"
    folder.mkdir()
    for name in ("a.bin", "b.bin", "c.bin"):
        (folder / name).write_text(name)
    found = files.described(folder, sorted(folder.iterdir()))

    def killed(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.store(bench.shelf.artefacts, "second", folder, found, killed)
    assert len(bench.shelf.artefacts.names("release-second")) == 1
    assert [row.release_id for row in releases.listing(bench.database)] == ["release"]
    with pytest.raises(InvalidInput, match="no release second"):
        offer_to(bench.database, "second", 1.0, (), 6.0)
    add(bench, "second", folder)
    row = releases.get(bench.database, "second")
    assert row is not None and releases.stored_ids(bench.database) == {"second"}
    copy = Copies(tmp_path / "copies", bench.shelf.artefacts, 1_000).folder(row)
    assert {path.name: path.read_text() for path in copy.iterdir()} == {name: name for name in row.files}


def test_a_release_that_is_used_is_not_removed(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "second"
    folder.mkdir()
    (folder / "a.bin").write_text("a")
    second = add(bench, "second", folder)
    offer_to(bench.database, "second", 1.0, (), 6.0)
    with pytest.raises(InvalidInput, match="is offered to everyone: withdraw it first"):
        releases.remove(bench.database, "second", 7.0)
    job = bench.start()
    assert job.release_hash == "second"
    withdraw(bench.database, "second", 7.0)
    with pytest.raises(InvalidInput, match="1 personalisations on release second have not ended"):
        releases.remove(bench.database, "second", 8.0)
    job_rows.apply(bench.database, "job", Failed("ends"), 8.0)
    releases.uses(bench.database, "dev", "second")
    assert releases.users(bench.database) == {"second": 1}
    with pytest.raises(InvalidInput, match="1 devices use a student of release second"):
        releases.remove(bench.database, "second", 8.0)
    devices.revoke(bench.database, "dev", 9.0)
    releases.remove(bench.database, "second", 9.0)
    assert [row.release_id for row in releases.listing(bench.database)] == ["release"]
    assert [each.release_id for each in releases.records(bench.database)] == ["release"]
    assert second.release_hash not in releases.stored_ids(bench.database)


def test_a_job_of_a_withdrawn_release_fails_with_advice_and_the_next_is_of_the_one_before(bench: Bench) -> None:
    second = add(bench, "second")
    offer_to(bench.database, "second", 1.0, (), 6.0)
    assert bench.start(rounds=2).release_hash == "second"
    assert bench.run(CountedLearning(), second).stage is Stage.AWAITING_PROTOTYPES
    withdraw(bench.database, "second", 7.0)
    assert bench.upload(1).stage is Stage.SELECTING
    failed = bench.run(CountedLearning(), second)
    assert (failed.stage, failed.error) == (
        Stage.FAILED,
        "the release of this personalisation was withdrawn; start again",
    )
    again = bench.start(job_id="again", key="k2")
    assert (again.job_id, again.release_hash) == ("again", "release")
    assert bench.run(CountedLearning()).stage is Stage.READY
    row = students.described_row(bench.shelf, bench.catalogue.offered("dev"), "dev", "again", base=False)
    assert row.release == "release"


def test_without_a_release_for_everyone_nothing_is_offered(bench: Bench) -> None:
    """No command leads here; a database that was changed by hand does."""
    with bench.database.writing() as connection:
        connection.exec_driver_sql("DELETE FROM rollouts")
    with pytest.raises(Unavailable, match="offers no release"):
        bench.catalogue.offered("dev")
