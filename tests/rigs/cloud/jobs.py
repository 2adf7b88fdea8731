"""Personalisation jobs without a server: learning that takes no time, and the stores of a cloud with its devices."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from isthmus.cloud.offers.offer import Offer
from isthmus.cloud.personalise import leases, service, signing, students
from isthmus.cloud.personalise.job import Job
from isthmus.cloud.personalise.learning import OnEpoch, RoundWork
from isthmus.cloud.personalise.leases import Held
from isthmus.cloud.personalise.runner import Runner
from isthmus.cloud.personalise.signing import Signer
from isthmus.cloud.personalise.students import Shelf
from isthmus.cloud.personalise.work_files import WorkFiles
from isthmus.cloud.releases.catalogue import Catalogue, offer_to
from isthmus.cloud.store import devices, releases
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.devices import Device
from isthmus.cloud.store.releases import ReleaseRow
from isthmus.distill.selection import Selection
from isthmus.proto.messages import Prototypes, SignedManifest, UploadMode

EPOCHS = 4


class CountedLearning:
    """Learning whose student is the text of all its inputs. It resumes from its checkpoint like the real one."""

    def __init__(self, before: Callable[[str], None] = lambda step: None) -> None:
        self._before = before

    def select(self, prototypes: Prototypes, *, round: int, seed: int) -> Selection:
        self._before(f"select {round}")
        indices_S = np.arange(len(prototypes.sizes_K) + round, dtype=np.int64)
        return Selection(indices_S, np.linspace(0.5, 1.5, len(indices_S), dtype=np.float32), ("a note",))

    def per_class(self, selection: Selection) -> tuple[int, ...]:
        return (len(selection), 0)

    def distil(self, work: RoundWork, on_epoch: OnEpoch) -> None:
        lines = work.checkpoint.read_text().splitlines() if work.checkpoint.exists() else []
        for epoch in range(len(lines), EPOCHS * (work.round + 1) // work.rounds):
            self._before(f"epoch {epoch}")
            chosen = f"{work.selection.indices_S.tolist()} by {work.selection.weights_S.tolist()}"
            lines.append(f"epoch {epoch} on {chosen} seed {work.seed}")
            work.checkpoint.write_text("\n".join(lines))
            on_epoch(epoch + 1, EPOCHS)

    def train_heads(self, work: RoundWork, heads: Path, on_epoch: OnEpoch) -> None:
        self._before("heads")
        heads.write_text(f"heads on {work.checkpoint.read_text()}")
        on_epoch(1, 1)

    def export(self, work: RoundWork, heads: Path | None, out_dir: Path) -> list[Path]:
        self._before(f"export {work.round}")
        out_dir.mkdir(exist_ok=True)
        file = out_dir / "audio_encoder.onnx"
        file.write_text(work.checkpoint.read_text())
        return [file]


def prototypes(rows: int = 2) -> Prototypes:
    return Prototypes(np.full((rows, 2), 0.5, np.float32), np.full(rows, 3, np.int32), UploadMode.PROTOTYPES, 3)


class Bench:
    """A database, a shelf, a folder for working files and one enrolled device, without a server.

    On PostgreSQL several benches of other folders are several machines of one cloud.
    """

    def __init__(self, folder: Path, database_url: str | None = None, artefacts_url: str | None = None) -> None:
        self.clock_s = 100.0
        self.folder = folder
        self._artefacts_url = artefacts_url or str(folder / "artefacts")
        self.offer = Offer("release", ("a", "b"), "{}", 8, (1.0,), 2, EPOCHS, 3)
        self.database = Database(database_url or f"sqlite:///{folder / 'isthmus.db'}")
        self.database.migrate()
        self.shelf = Shelf(self.database, Artefacts(self._artefacts_url))
        self.catalogue = Catalogue(self.database)
        if not releases.records(self.database):
            self.publish(self.offer)
        self.signer = signing.load_or_create(folder / "key")
        self.work_dir = folder / "work"
        self.files = WorkFiles(self.work_dir, self.shelf.artefacts if self.database.shared else None)
        if devices.get(self.database, "dev") is None:
            self.enrol("dev")

    def on_another_machine(self, folder: Path) -> "Bench":
        """Return a bench with the same database and artefacts, and a folder of its own."""
        folder.mkdir()
        other = Bench(folder, self.database.url.render_as_string(hide_password=False), self._artefacts_url)
        other.clock_s = self.clock_s
        return other

    def publish(self, offer: Offer) -> None:
        """Publish a release without files, and offer it to everyone."""
        releases.put(self.database, ReleaseRow(offer, {}, stored=False, created_s=self.now_s()))
        offer_to(self.database, offer.release_hash, 1.0, (), self.now_s())

    def described(self, student_id: str = "", now_s: float = 0.0, signer: Signer | None = None) -> SignedManifest:
        """Return the manifest of a student, as the device "dev" is told it."""
        offered = self.catalogue.offered("dev")
        row = students.described_row(self.shelf, offered, "dev", student_id, base=False)
        return students.describe(self.shelf, signer or self.signer, offered, row, now_s)

    def enrol(self, device_id: str) -> None:
        devices.add(self.database, Device(device_id, "kiosk", bytes(32), 1.0), at_most=9_999)

    def runner(self, learning: CountedLearning, offer: Offer | None = None) -> Runner:
        return Runner(self.shelf, self.signer, offer or self.offer, learning, self.files, 3, self.now_s)

    def take(self, worker: str = "worker", release: str = "release", lease_s: float = leases.LEASE_S) -> Held | None:
        return leases.take(self.database, worker, releases=(release,), now_s=self.now_s(), lease_s=lease_s)

    def run(self, learning: CountedLearning, offer: Offer | None = None) -> Job:
        """Take the job that is due, as a worker that knows that the one before has ended, and run it."""
        leases.hand_back(self.database)
        held = self.take(release=(offer or self.offer).release_hash)
        assert held is not None
        return self.runner(learning, offer).run(held)

    def now_s(self) -> float:
        self.clock_s += 1.0
        return self.clock_s

    def start(self, rounds: int = 1, device_id: str = "dev", job_id: str = "job", key: str = "k") -> Job:
        return service.start(
            self.catalogue,
            device_id,
            idempotency_key=key,
            prototypes=prototypes(),
            rounds=rounds,
            seed=1,
            now_s=self.now_s(),
            new_id=lambda: job_id,
            at_most_waiting=9_999,
        )

    def upload(self, round: int) -> Job:
        return service.upload(
            self.catalogue, "dev", job_id="job", round=round, prototypes=prototypes(3), now_s=self.now_s()
        )

    def student(self, student_id: str) -> bytes:
        (name,) = (name for name in self.shelf.artefacts.names(student_id) if name.startswith("audio_encoder"))
        with self.shelf.artefacts.open(student_id, name) as file:
            return file.read()
