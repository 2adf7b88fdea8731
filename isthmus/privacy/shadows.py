"""Shadow uploads: uploads of public clips, from which an attacker learns."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from isthmus.data.cache.read import ClipArrays
from isthmus.distill.student.evaluate import StudentOutputs
from isthmus.privacy.uploads import Floats, Indices, Mode, Upload, clusters, make_upload, means_by_cluster, mode_rows

SHADOWS = 64


@dataclass(frozen=True, eq=False)
class Drawn:
    """The public clips in each shadow upload: ``member_SN``, and ``pool_SN``, all clips of that person.

    ``stranger_SN``: clips that cannot be in the upload. These are the clips of other persons or, if persons are not
    known, the clips that were not drawn.
    """

    member_SN: npt.NDArray[np.bool_]
    pool_SN: npt.NDArray[np.bool_]
    stranger_SN: npt.NDArray[np.bool_]
    persons_N: Indices
    """The pool of each clip, -1 if it is in none."""


def pools_of(public: ClipArrays, *, by_person: bool) -> list[Indices]:
    """Group public clips by person, or into one pool if a client is no person (the paper's split by class)."""
    people = sorted(set(public.actors)) if by_person else []
    if len(people) < 2:
        return [np.arange(len(public), dtype=np.int64)]
    actors = np.array(public.actors)
    return [np.flatnonzero(actors == person) for person in people]


def draw(pools: list[Indices], clips: int, *, size: int, seed: int, shadows: int) -> Drawn:
    """Draw from pools in turn, at most half of each, so that non-members remain. Raises ValueError if none has two."""
    pools = [pool_N for pool_N in pools if len(pool_N) >= 2]
    if not pools:
        raise ValueError("too few public clips to train an attack")
    member_SN, pool_SN = (np.zeros((shadows, clips), dtype=bool) for _ in range(2))
    persons_N = np.full(clips, -1, np.int64)
    for person, pool_N in enumerate(pools):
        persons_N[pool_N] = person
    rng = np.random.default_rng(seed)
    for shadow in range(shadows):
        pool_N = pools[shadow % len(pools)]
        pool_SN[shadow, pool_N] = True
        member_SN[shadow, rng.choice(pool_N, min(size, len(pool_N) // 2), replace=False)] = True
    stranger_SN = ~pool_SN if len(pools) > 1 else ~member_SN
    return Drawn(member_SN, pool_SN, stranger_SN, persons_N)


class ShadowUploads:
    """The shadow uploads of every mode. Clusters are made once per floor; all noise levels share them."""

    def __init__(self, public: StudentOutputs, drawn: Drawn, *, seed: int, clip_per_cluster: int):
        self._public, self._drawn, self._seed, self._clip_per_cluster = public, drawn, seed, clip_per_cluster
        self._labels: dict[int, list[Indices]] = {}
        self.smallest = int(drawn.member_SN.sum(axis=1).min())

    def uploads(self, mode: Mode) -> list[Upload]:
        """Return one upload per shadow. Raises BadPrototypes if a shadow has fewer clips than the floor."""
        made = []
        labels = self._clusters(mode) if mode.floor > 1 else [None] * len(self._drawn.member_SN)
        for shadow, labels_N in enumerate(labels):
            made.append(
                make_upload(
                    mode,
                    self._outputs(shadow),
                    seed=self._seed,
                    noise_seed=hash_seed(self._seed, "shadow", mode.slug, str(shadow)),
                    clip_per_cluster=self._clip_per_cluster,
                    labels_N=labels_N,
                )
            )
        return made

    def training_pairs(self, mode: Mode, targets_NP: Floats) -> tuple[Floats, Floats, Indices]:
        """Return rows as sent, the target of each (the mean coefficients of its clips), and the person of each."""
        persons_N = self._drawn.persons_N
        if mode.floor == 1:
            return mode_rows(mode, self._public), targets_NP, persons_N
        rows, targets, persons = [], [], []
        for shadow, upload in enumerate(self.uploads(mode)):
            rows.append(upload.rows_KV)
            member_N = self._drawn.member_SN[shadow]
            targets.append(means_by_cluster(targets_NP[member_N], upload.labels_N)[0])
            persons.append(np.full(len(upload.rows_KV), persons_N[member_N][0]))
        return np.concatenate(rows), np.concatenate(targets).astype(np.float32), np.concatenate(persons)

    def _outputs(self, shadow: int) -> StudentOutputs:
        return picked(self._public, np.flatnonzero(self._drawn.member_SN[shadow]))

    def _clusters(self, mode: Mode) -> list[Indices]:
        if mode.floor not in self._labels:
            self._labels[mode.floor] = [
                clusters(mode, self._outputs(shadow), seed=self._seed, clip_per_cluster=self._clip_per_cluster)
                for shadow in range(len(self._drawn.member_SN))
            ]
        return self._labels[mode.floor]


def picked(outputs: StudentOutputs, rows_N: Indices) -> StudentOutputs:
    """Return the outputs of some of the clips."""
    return StudentOutputs(outputs.audio_ND[rows_N], outputs.visual_ND[rows_N], outputs.probabilities_NC[rows_N])


def hash_seed(seed: int, *names: str) -> int:
    """Return a 64-bit seed for one purpose, the same in every run."""
    words = [int.from_bytes(name.encode(), "little") for name in names]
    state = np.random.SeedSequence([abs(seed), *words]).generate_state(2, np.uint32)
    return int(state[0]) << 32 | int(state[1])
