"""What the attacks of one seed work with: outputs of the student, the clients' clips, shadow uploads, attack models."""

import hashlib
import io
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.data.cache.read import ClipArrays
from isthmus.data.files import write_atomically
from isthmus.data.splits import latency_halves
from isthmus.data.transforms import frame_positions
from isthmus.distill.release import Release
from isthmus.distill.student.evaluate import StudentOutputs, student_outputs
from isthmus.distill.training.checkpoint import state_hash
from isthmus.privacy.attacks import (
    COMPONENTS,
    HIDDEN,
    MAX_SIDE,
    RIDGES,
    TRAINING,
    Basis,
    Decoder,
    LikelihoodRatio,
    Scenes,
    attacker_view,
    closeness,
    fit_likelihood_ratio,
    scenes_of,
    train_decoder,
)
from isthmus.privacy.shadows import SHADOWS, Drawn, ShadowUploads, draw, hash_seed, picked, pools_of
from isthmus.privacy.uploads import Floats, Indices, Mode, Upload, make_upload, mode_rows

_FORMAT = "1"


@dataclass(frozen=True, eq=False)
class Client:
    """A client's clips of one seed: those in the upload, the same person's other clips, and other clients' clips."""

    name: str
    scenes: Scenes
    labels_N: Indices
    names: tuple[str, ...]
    selection: StudentOutputs
    same_person: StudentOutputs
    others: StudentOutputs | None
    """None if the split has only one client."""


@dataclass(frozen=True, eq=False)
class Attacker:
    """The attack models of one mode, trained on public clips."""

    decoder: Decoder | None
    ratio: LikelihoodRatio
    shadow_rows: list[Floats]
    unit: float


class Material:
    """Everything of one seed. Costly parts (outputs, decoders) are made when the first missing cell needs them."""

    def __init__(
        self,
        release: Release,
        own: dict[str, ClipArrays],
        public_scenes: Scenes,
        by_person: bool,
        *,
        seed: int,
        out: Path,
        device: torch.device,
    ):
        self.release, self._own, self.public_scenes = release, own, public_scenes
        self._by_person, self.seed, self._device, self._out = by_person, seed, device, out
        self._student = release.student(seed)
        self._student_hash = state_hash([self._student])
        facts = [_FORMAT, release.outputs_key(), self._student_hash, str(seed), repr(TRAINING)]
        facts += [str(COMPONENTS), str(HIDDEN), repr(RIDGES), str(MAX_SIDE), str(SHADOWS), str(by_person)]
        facts += [clips.content_hash for _, clips in sorted(own.items())]
        self.key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
        self._halves = {
            name: latency_halves(clips.names, [int(label) for label in clips.labels_N], seed)
            for name, clips in own.items()
        }
        self.selection_sizes = {name: len(halves[0]) for name, halves in self._halves.items()}
        pools = pools_of(release.public, by_person=by_person)
        wanted = round(float(np.mean(list(self.selection_sizes.values()))))
        self.drawn: Drawn = draw(
            pools, len(release.public), size=wanted, seed=hash_seed(seed, "shadows"), shadows=SHADOWS
        )
        self.shadow_size = int(self.drawn.member_SN.sum(axis=1).min())
        self._outputs: dict[str, StudentOutputs] = {}
        self._uploads: ShadowUploads | None = None
        self._basis: Basis | None = None
        self._attackers: dict[str, Attacker] = {}

    @property
    def basis(self) -> Basis:
        """The principal components of the public clips."""
        if self._basis is None:
            self._basis = Basis(self.public_scenes, seed=self.seed)
        return self._basis

    def client(self, name: str) -> Client:
        """Return a client's clips and the student's outputs for them."""
        clips, (selection, rest) = self._own[name], self._halves[name]
        chosen_N, rest_N = clips.indices(selection), clips.indices(rest)
        outputs = self.client_outputs(name)
        strangers = [self.client_outputs(other) for other in self._own if other != name]
        own = clips.subset(chosen_N)
        return Client(
            name,
            scenes_of(own),
            np.asarray(own.labels_N),
            own.names,
            picked(outputs, chosen_N),
            picked(outputs, rest_N),
            _joined(strangers) if strangers else None,
        )

    def client_outputs(self, name: str) -> StudentOutputs:
        """Return the student's outputs for all clips of a client."""
        return self._cached(f"client-{name}", self._own[name])

    def public_outputs(self) -> StudentOutputs:
        """Return the student's outputs for the public clips."""
        return self._cached("public", self.release.public)

    def _cached(self, who: str, clips: ClipArrays) -> StudentOutputs:
        """Return the student's outputs, computed once and kept beside the cells."""
        if who not in self._outputs:
            path = self._out / "outputs" / f"{who}-{self._student_hash}-{clips.content_hash[:16]}.npz"
            if not path.exists():
                head = self.release.teacher_head
                made = student_outputs(self._student, head, evaluated_frames_alone(clips), self._device)
                write_atomically(path, npz(asdict(made)))
            try:
                with np.load(path, allow_pickle=False) as kept:
                    self._outputs[who] = StudentOutputs(**{key: kept[key] for key in kept.files})
            except (ValueError, TypeError, zipfile.BadZipFile) as error:
                raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error
        return self._outputs[who]

    def attacker(self, mode: Mode) -> Attacker:
        """Return the attack models of a mode, trained on public clips."""
        if mode.slug not in self._attackers:
            self._attackers.clear()  # the clients of one mode follow each other
            public = self.public_outputs()
            if self._uploads is None:
                per_cluster = self.release.recipe.personalise.clips_per_cluster
                self._uploads = ShadowUploads(public, self.drawn, seed=self.seed, clip_per_cluster=per_cluster)
            decoder = None
            if mode.kind != "stranger":
                targets_NP = self.basis.coefficients(self.public_scenes)
                rows_KV, targets_KP, persons_K = self._uploads.training_pairs(mode, targets_NP)
                decoder = train_decoder(
                    attacker_view(rows_KV, in_features=mode.in_features),
                    targets_KP,
                    persons_K,
                    self.basis.sound_width,
                    seed=hash_seed(self.seed, "decoder", mode.slug) % (1 << 63),
                    device=self._device,
                )
            rows_NV = mode_rows(mode, public)
            unit = float(np.sqrt(rows_NV.var(axis=0).sum())) or 1.0
            shadow_rows = [upload.rows_KV for upload in self._uploads.uploads(mode)]
            closeness_SN = closeness(shadow_rows, rows_NV, unit)
            drawn = self.drawn
            ratio = fit_likelihood_ratio(
                closeness_SN, drawn.member_SN, drawn.pool_SN & ~drawn.member_SN, drawn.stranger_SN
            )
            self._attackers[mode.slug] = Attacker(decoder, ratio, shadow_rows, unit)
        return self._attackers[mode.slug]

    def upload(self, client: Client, mode: Mode) -> Upload:
        """Return what the client uploads in this mode."""
        source = client.selection
        if mode.kind == "stranger":
            rng = np.random.default_rng(hash_seed(self.seed, "stranger", client.name))
            shadow_N = self.drawn.member_SN[rng.integers(len(self.drawn.member_SN))]
            source = picked(self.public_outputs(), np.flatnonzero(shadow_N))
        return make_upload(
            mode,
            source,
            seed=self.seed,
            noise_seed=hash_seed(self.seed, "noise", mode.slug, client.name),
            clip_per_cluster=self.release.recipe.personalise.clips_per_cluster,
            labels_N=None,
        )


def evaluated_frames_alone(clips: ClipArrays) -> ClipArrays:
    """Return the clips with evaluation frames only: the same outputs for a fraction of the work."""
    positions = frame_positions(clips.spec)
    frames_NKHWC = np.stack([np.asarray(clips.frames_NKHWC[row])[positions] for row in range(len(clips))])
    spec = replace(clips.spec, frames_stored=clips.spec.frames_used)
    return replace(clips, frames_NKHWC=frames_NKHWC, spec=spec, source=None)


def _joined(outputs: Sequence[StudentOutputs]) -> StudentOutputs:
    return StudentOutputs(
        np.concatenate([each.audio_ND for each in outputs]),
        np.concatenate([each.visual_ND for each in outputs]),
        np.concatenate([each.probabilities_NC for each in outputs]),
    )


def npz(arrays: dict[str, Any]) -> bytes:
    """Return the arrays as the bytes of an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()
