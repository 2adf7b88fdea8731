"""One contract for every pair of stores: {SQLite, PostgreSQL} x {a folder, S3 over HTTP}.

Jobs are taken by one worker at a time, a worker that lost its lease writes nothing, and files are what was written.
"""

import os
import threading
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import sqlalchemy as sa

from isthmus.cloud.offers.offer import Offer
from isthmus.cloud.personalise import job_rows, leases, students
from isthmus.cloud.personalise.job import MAX_ATTEMPTS, EpochDone, Failed, Selected
from isthmus.cloud.personalise.leases import Held, LeaseLost
from isthmus.cloud.store import students as rows
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.schema import jobs
from isthmus.cloud.store.students import StudentRow
from isthmus.proto.errors import Corrupt, InvalidInput, NotYours, Unavailable
from isthmus.proto.messages import SignedManifest, Stage
from tests.rigs.cloud.jobs import Bench, CountedLearning
from tests.rigs.cloud.postgres import Cluster


def taken(bench: Bench, worker: str, lease_s: float = leases.LEASE_S) -> Held:
    held = bench.take(worker, lease_s=lease_s)
    assert held is not None
    return held


def test_a_job_runs_to_its_student(bench: Bench) -> None:
    bench.start(rounds=2)
    assert bench.run(CountedLearning()).stage is Stage.AWAITING_PROTOTYPES
    bench.upload(1)
    ready = bench.run(CountedLearning())
    assert (ready.stage, ready.student_id) == (Stage.READY, "job")
    student = bench.described("job")
    file = students.check_fetch(bench.shelf, "dev", "job", "audio_encoder.onnx", 0)
    assert student == students.reachable(bench.shelf, "dev", "job").signed
    assert b"".join(chunk.data for chunk in students.chunks(bench.shelf, "job", file, 0)) == bench.student("job")
    assert bench.files.job_ids() == set(), "no working files are left"
    assert bench.shelf.artefacts.names("work-job") == []


def test_the_newest_student_is_the_devices_own_or_else_the_base_student_and_never_anothers(bench: Bench) -> None:
    bench.enrol("other")
    for number, (name, owner) in enumerate([("base", None), ("a", "dev"), ("b", "dev"), ("c", "other")]):
        signed = SignedManifest(name.encode(), b"signature")
        rows.put(bench.database, StudentRow(name, owner, "base" if owner is None else "personal", signed, 5.0 + number))
    rows.put(bench.database, StudentRow("a2", "dev", "personal", SignedManifest(b"a2", b"signature"), 7.0))

    def newest(device_id: str, base_id: str = "base") -> StudentRow | None:
        return rows.newest(bench.database, device_id, base_id)

    assert newest("dev") == rows.get(bench.database, "b"), "of the same second, the one with the last id"
    assert newest("other") == rows.get(bench.database, "c")
    assert newest("new") == rows.get(bench.database, "base")
    assert newest("new", "c") is None, "no base student, but another device's"
    assert newest("new", "unknown") is None


def test_a_description_is_two_queries_and_nothing_around_them(bench: Bench) -> None:
    bench.start(rounds=1)
    bench.run(CountedLearning())
    bench.described("")
    said: list[str] = []
    sa.event.listen(bench.database._engine, "before_cursor_execute", lambda *heard: said.append(heard[2].split()[0]))
    bench.described("")
    assert said == ["SELECT", "SELECT"], "what is offered, and the newest student"


def test_who_asks_for_the_base_student_gets_it_whatever_else_is_named(bench: Bench) -> None:
    bench.start(rounds=1)
    bench.run(CountedLearning())
    offered = bench.catalogue.offered("dev")
    signed = SignedManifest(b"base", b"signature")
    rows.put(bench.database, StudentRow(students.base_student_id(offered.offer), None, "base", signed, 5.0))

    def described(student_id: str, *, base: bool) -> StudentRow:
        return students.described_row(bench.shelf, offered, "dev", student_id, base=base)

    own = described("", base=False)
    assert own.device_id == "dev" and described(own.student_id, base=False) == own
    assert described("", base=True).device_id is None
    assert described(own.student_id, base=True) == described("", base=True)


def test_each_of_many_jobs_is_taken_by_one_of_many_workers(bench: Bench) -> None:
    for number in range(12):
        bench.enrol(f"dev{number}")
        bench.start(device_id=f"dev{number}", job_id=f"job{number}")
    taken_by: dict[str, list[str]] = {}

    def work(worker: str) -> None:
        mine = taken_by.setdefault(worker, [])
        while (held := bench.take(worker)) is not None:
            mine.append(held.job.job_id)
            job_rows.apply(bench.database, held.job.job_id, Failed("done with it"), 1.0)

    threads = [threading.Thread(target=work, args=(f"worker{number}",)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken_jobs = sorted(job_id for mine in taken_by.values() for job_id in mine)
    assert taken_jobs == sorted(f"job{number}" for number in range(12))


def test_a_begun_job_comes_first_and_a_stalled_one_waits(bench: Bench) -> None:
    bench.enrol("dev2")
    bench.start()
    bench.start(device_id="dev2", job_id="later")
    assert taken(bench, "first").job.job_id == "job"
    leases.hand_back(bench.database, "first")
    with bench.database.writing() as connection:
        connection.execute(jobs.update().where(jobs.c.id == "job").values(not_before_s=bench.clock_s + 500))
    assert taken(bench, "second").job.job_id == "later"
    assert bench.take("third") is None and not leases.is_due(bench.database, bench.now_s())
    bench.clock_s += 500
    assert taken(bench, "third").job.job_id == "job"


def test_a_held_job_is_nobody_elses_until_its_lease_ends_or_is_handed_back(bench: Bench) -> None:
    bench.start()
    first = taken(bench, "first")
    assert bench.take("second") is None
    again = taken(bench, "first")
    assert (again.lease.fence, again.job.attempts) == (first.lease.fence + 1, 0), "its own worker may take it again"
    leases.hand_back(bench.database, "first")
    assert taken(bench, "second").job.attempts == 0, "handing back is no failure"


def test_a_worker_that_lost_its_lease_writes_nothing(bench: Bench, tmp_path: Path) -> None:
    bench.start()
    late = taken(bench, "late", lease_s=-1.0)
    job_rows.apply(bench.database, "job", Selected((1, 0)), bench.now_s())
    there = taken(bench, "there")
    assert there.job.attempts == 1, "a lease that has ended counts as a crash"
    before = job_rows.get(bench.database, "job")
    file = tmp_path / "audio_encoder.onnx"
    file.write_bytes(b"late")
    with pytest.raises(LeaseLost):
        leases.extend(bench.database, late.lease)
    with leases.kept(bench.database, late.lease):
        with pytest.raises(LeaseLost):
            job_rows.apply(bench.database, "job", EpochDone(1, 4), bench.now_s())
        with pytest.raises(LeaseLost):
            students.publish(
                bench.shelf,
                bench.signer,
                bench.offer,
                student_id="job",
                device_id="dev",
                kind="final",
                files=[file],
                heads=None,
                now_s=1.0,
            )
    leases.hand_back(bench.database, "late")
    assert job_rows.get(bench.database, "job") == before
    with pytest.raises(LeaseLost):
        bench.runner(CountedLearning()).run(late)
    ready = bench.runner(CountedLearning()).run(there)
    assert ready.stage is Stage.READY
    published = students.check_fetch(bench.shelf, "dev", "job", "audio_encoder.onnx", 0)
    assert bench.shelf.artefacts.read("job", "audio_encoder.onnx", published.sha256, 9_999) != b"late"


def test_a_job_that_kills_every_worker_fails_and_holds_nobody_up(bench: Bench) -> None:
    bench.start()
    bench.enrol("dev2")
    bench.start(device_id="dev2", job_id="innocent")
    killed = 0
    while (held := taken(bench, f"worker{killed}")).job.job_id == "job" and held.job.stage is not Stage.FAILED:
        leases.died(bench.database, held.lease.worker)
        killed += 1
    assert killed == 5
    ended = job_rows.get(bench.database, "job")
    assert ended is not None and "crashed 5 times while selecting" in ended.error
    assert taken(bench, "last").job.job_id == "innocent"


def test_a_job_whose_steps_die_elsewhere_fails_and_holds_nobody_up(bench: Bench) -> None:
    bench.start()
    bench.enrol("dev2")
    bench.start(device_id="dev2", job_id="innocent")
    first = taken(bench, "worker").lease
    leases.step_died(bench.database, first)
    died = 1
    while (held := taken(bench, "worker")).job.job_id == "job" and held.job.stage is not Stage.FAILED:
        leases.step_died(bench.database, first)
        leases.extend(bench.database, held.lease)  # raises if who has lost the lease could end another's
        leases.step_died(bench.database, held.lease)
        died += 1
    assert died == MAX_ATTEMPTS
    ended = job_rows.get(bench.database, "job")
    assert ended is not None and f"crashed {MAX_ATTEMPTS} times while selecting" in ended.error
    assert taken(bench, "worker").job.job_id == "innocent"


def test_a_job_of_another_release_is_left_to_its_workers_for_a_while(bench: Bench) -> None:
    bench.start()
    newer = Offer("newer", ("a", "b"), "{}", 8, (1.0,), 2, 4, 3, bench.folder)
    if bench.database.shared:
        assert bench.take("other", release="newer") is None
        bench.clock_s += leases.OTHER_RELEASE_S
    assert bench.run(CountedLearning(), newer).error == "the server has a new release; start again"


def test_another_machine_goes_on_from_the_end_of_a_stage(bench: Bench, tmp_path: Path) -> None:
    class Gone(BaseException):
        """Ends a worker between two steps, as ``kill -9`` does."""

    def vanish(step: str) -> None:
        if step == "heads":
            raise Gone

    if not bench.database.shared:
        assert bench.files.copies is None, "an SQLite database is used by one machine alone"
        return
    steps: list[str] = []
    bench.start()
    with pytest.raises(Gone):
        bench.run(CountedLearning(vanish))
    with bench.database.writing() as connection:
        connection.execute(jobs.update().values(lease_until_s=1.0))
    elsewhere = bench.on_another_machine(tmp_path / "elsewhere")
    held = taken(elsewhere, "elsewhere")
    ready = elsewhere.runner(CountedLearning(steps.append)).run(held)
    assert (ready.stage, steps) == (Stage.READY, ["heads", "export 0"]), "no epoch is trained again"
    elsewhere.database.close()


def test_files_are_found_by_their_content(bench: Bench, tmp_path: Path) -> None:
    artefacts, source = bench.shelf.artefacts, tmp_path / "source"
    hashes = []
    for content in (b"first", b"second"):
        source.write_bytes(content)
        hashes.append(artefacts.put("student", "x.onnx", source))
    for sha256, content in zip(hashes, (b"first", b"second"), strict=True):
        assert artefacts.read("student", "x.onnx", sha256, 100) == content, "a later write changes no earlier file"
        assert artefacts.sha256("student", "x.onnx", sha256) == sha256
        with artefacts.open("student", "x.onnx", sha256) as file:
            file.seek(2)
            assert file.read() == content[2:]
        with artefacts.on_disk("student", "x.onnx", tmp_path / "scratch", sha256) as path:
            assert path.read_bytes() == content
    assert artefacts.names("student") == sorted(f"x.onnx.{sha256.hex()}" for sha256 in hashes)
    source.write_bytes(b"damage")
    artefacts.place("student", f"x.onnx.{hashes[0].hex()}", source)
    with pytest.raises(Corrupt):
        artefacts.read("student", "x.onnx", hashes[0], 100)
    with pytest.raises(Corrupt), artefacts.on_disk("student", "x.onnx", tmp_path / "scratch", hashes[0]):
        pass
    artefacts.remove("student")
    artefacts.remove("student")
    with pytest.raises(NotYours), artefacts.open("student", "x.onnx", hashes[1]):
        pass
    with pytest.raises(NotYours):
        artefacts.fingerprint("student", "x.onnx", hashes[1])


def test_files_of_version_0_1_are_found_under_their_plain_name(bench: Bench, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"old")
    bench.shelf.artefacts.place("student", "x.onnx", source)
    sha256 = bench.shelf.artefacts.sha256("student", "x.onnx")
    assert bench.shelf.artefacts.read("student", "x.onnx", sha256, 100) == b"old"
    bench.shelf.check("student", "x.onnx", sha256)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "a\0", "x" * 65, "a b"])
def test_names_that_could_lead_elsewhere_are_not_there(tmp_path: Path, name: str) -> None:
    artefacts = Artefacts(str(tmp_path / "a"))
    for owner, file in ((name, "x.onnx"), ("student", name)):
        with pytest.raises(NotYours):
            artefacts.put(owner, file, tmp_path)
        with pytest.raises(NotYours), artefacts.open(owner, file):
            pass


def test_artefacts_that_cannot_be_used_are_refused_with_the_way_out(s3: str, tmp_path: Path) -> None:
    Artefacts(f"{s3}/prefix").check()
    nowhere = Artefacts("s3://no-such-bucket/prefix")
    with pytest.raises(InvalidInput, match="create the bucket"):
        nowhere.check()
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(Unavailable):
        nowhere.put("student", "x.onnx", tmp_path / "file")
    with pytest.raises(InvalidInput, match="give a folder or s3://"):
        Artefacts("nonsense://x")


def test_a_bucket_without_rights_is_refused_with_the_way_out(s3: str) -> None:
    def check_rights(after: str) -> None:
        """Let the service check credentials after so many more calls. It knows no user, so it then refuses all."""
        url = f"{os.environ['AWS_ENDPOINT_URL_S3']}/moto-api/reset-auth"
        urlopen(Request(url, after.encode(), {"Content-Type": "text/plain"}), timeout=60).close()

    check_rights("0")
    try:
        with pytest.raises(InvalidInput, match=r"no right to write, read or delete in .*; correct the credentials"):
            Artefacts(f"{s3}/prefix").check()
    finally:
        check_rights("inf")
    Artefacts(f"{s3}/prefix").check()


def test_a_database_that_cannot_be_used_is_refused_with_the_way_out(cluster: Cluster) -> None:
    from isthmus.cloud.store.database import Database

    with pytest.raises(InvalidInput, match="create the database"):
        Database(str(sa.make_url(cluster.url).set(database="nowhere"))).connect()
    cluster.sql("CREATE ROLE guest LOGIN")
    with cluster.database() as empty:
        guest = Database(empty.url.set(username="guest").render_as_string(hide_password=False))
        guest.connect()
        with pytest.raises(InvalidInput, match="may not make its tables"):
            guest.migrate()
        guest.close()
    cluster.sql("DROP ROLE guest")


def test_a_database_that_restarts_in_mid_job_costs_no_step(cluster: Cluster, tmp_path: Path) -> None:
    steps: list[str] = []

    def stop_once(step: str) -> None:
        steps.append(step)
        if step == "epoch 2" and steps.count(step) == 1:
            cluster.stop()

    with cluster.database() as database:
        bench = Bench(tmp_path, database.url.render_as_string(hide_password=False))
        bench.start()
        held = taken(bench, "worker")
        with pytest.raises(Unavailable):
            bench.runner(CountedLearning(stop_once)).run(held)
        cluster.start()
        again = taken(bench, "worker")
        ready = bench.runner(CountedLearning(stop_once)).run(again)
        assert (again.job.attempts, ready.stage) == (0, Stage.READY)
        assert steps == ["select 0", "epoch 0", "epoch 1", "epoch 2", "epoch 3", "heads", "export 0"]
        bench.database.close()


def test_a_bucket_that_vanishes_is_out_of_reach_and_its_files_are_not_taken_for_deleted(
    s3: str, tmp_path: Path
) -> None:
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket="passing")
    artefacts = Artefacts("s3://passing/prefix")
    (tmp_path / "file").write_bytes(b"x")
    sha256 = artefacts.put("student", "x.onnx", tmp_path / "file")
    with pytest.raises(NotYours), artefacts.open("student", "y.onnx"):
        pass
    client.delete_object(Bucket="passing", Key=f"prefix/student/x.onnx.{sha256.hex()}")
    client.delete_bucket(Bucket="passing")
    with pytest.raises(Unavailable), artefacts.open("student", "x.onnx", sha256):
        pass
    with pytest.raises(Unavailable):
        artefacts.fingerprint("student", "x.onnx", sha256)
