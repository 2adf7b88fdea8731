"""Both attacks on every mode, client and seed, and what each mode reveals to the cloud. Each cell is resumable."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.data.cache.read import ClipArrays
from isthmus.data.clip import Listing
from isthmus.data.files import write_atomically
from isthmus.data.splits import Split, latency_halves
from isthmus.data.transforms import frame_positions
from isthmus.distill.prepare import decode
from isthmus.distill.release import Release
from isthmus.distill.selection import select_cosine
from isthmus.distill.student.evaluate import StudentOutputs, student_outputs
from isthmus.distill.training.checkpoint import state_hash
from isthmus.distill.training.teacher_cache import head_probabilities
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
    reconstruct,
    scenes_of,
    train_decoder,
)
from isthmus.privacy.likeness import (
    auc,
    bootstrapped,
    retrieval_rate,
    same_class_rate,
    squared_distances,
    ssim,
    true_positive_rate,
)
from isthmus.privacy.shadows import SHADOWS, Drawn, ShadowUploads, draw, hash_seed, picked, pools_of
from isthmus.privacy.uploads import Floats, Indices, Mode, Upload, Wide, make_upload, mode_rows

SPECTROGRAM_RANGE = 6.0
"""Data range of the spectrogram's SSIM: three standard deviations in each direction."""
BASELINES = ("mean public clip", "mean public clip of the class", "the decoder's own limit")
_FORMAT = "1"

Report = Callable[[str], None]


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
class _Attacker:
    """The attack models of one mode, trained on public clips."""

    decoder: Decoder | None
    ratio: LikelihoodRatio
    shadow_rows: list[Floats]
    unit: float


def run(
    release: Release,
    listing: Listing,
    split: Split,
    *,
    seeds: Sequence[int],
    clients: Sequence[str],
    modes: Sequence[Mode],
    out: Path,
    device: torch.device,
    report: Report,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Measure the missing cells below ``out`` and return the whole result. ``advance`` is called after each cell.

    Raises ValueError for an unknown client or if no mode can be measured; ReleaseError for a missing student.
    """
    chosen = list(clients) or sorted(split.clients)
    unknown = [name for name in chosen if name not in split.clients]
    if unknown:
        raise ValueError(f"no client {', '.join(unknown)} in this release's split; it has {', '.join(split.clients)}")
    own = {
        name: decode(listing, names, release.recipe, release.root / "private") for name, names in split.clients.items()
    }
    public_scenes = scenes_of(release.public)
    cells: list[dict[str, Any]] = []
    skipped: list[str] = []
    for seed in seeds:
        work = _Seed(release, own, public_scenes, split.name == "by-actor", seed=seed, out=out, device=device)
        for name in chosen:
            if work.selection_sizes[name] >= 2:
                cells.append(work.cell(name, None, examples=seed == seeds[0]))
            advance(1)
        for mode in modes:
            for name in chosen:
                enough = min(work.selection_sizes[name], work.shadow_size)
                if max(mode.floor, 2) > enough:
                    skipped.append(f"{mode.name}, client {name}, seed {seed}: {enough} clips are too few")
                    report("skipped: " + skipped[-1])
                else:
                    cells.append(work.cell(name, mode, examples=seed == seeds[0]))
                    report(_line(cells[-1]))
                advance(1)
    if not any(cell["kind"] == "mode" for cell in cells):
        raise ValueError("no mode could be measured: every floor is larger than the number of clips. Lower --floors.")
    return {
        "what": "what someone who holds an upload can learn, by mode",
        "recipe": release.recipe.name,
        "classes": list(release.recipe.classes),
        "release": release.outputs_key(),
        "split": split.name,
        "seeds": list(seeds),
        "clients": chosen,
        "public_clips": len(release.public),
        "shadow_uploads": SHADOWS,
        "threads": torch.get_num_threads(),
        "skipped": skipped,
        "cells": cells,
    }


class _Seed:
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
        self._release, self._own, self._public_scenes = release, own, public_scenes
        self._by_person, self._seed, self._device, self._out = by_person, seed, device, out
        self._student = release.student(seed)
        self._student_hash = state_hash([self._student])
        facts = [_FORMAT, release.outputs_key(), self._student_hash, str(seed), repr(TRAINING)]
        facts += [str(COMPONENTS), str(HIDDEN), repr(RIDGES), str(MAX_SIDE), str(SHADOWS), str(by_person)]
        facts += [clips.content_hash for _, clips in sorted(own.items())]
        self._key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
        self._halves = {
            name: latency_halves(clips.names, [int(label) for label in clips.labels_N], seed)
            for name, clips in own.items()
        }
        self.selection_sizes = {name: len(halves[0]) for name, halves in self._halves.items()}
        pools = pools_of(release.public, by_person=by_person)
        wanted = round(float(np.mean(list(self.selection_sizes.values()))))
        self._drawn: Drawn = draw(
            pools, len(release.public), size=wanted, seed=hash_seed(seed, "shadows"), shadows=SHADOWS
        )
        self.shadow_size = int(self._drawn.member_SN.sum(axis=1).min())
        self._outputs: dict[str, StudentOutputs] = {}
        self._uploads: ShadowUploads | None = None
        self._basis: Basis | None = None
        self._attackers: dict[str, _Attacker] = {}

    def cell(self, name: str, mode: Mode | None, *, examples: bool) -> dict[str, Any]:
        """Return the cell of one client and mode, or of its baselines. Read it if it was measured before."""
        stem = self._out / "cells" / self._key / f"{name}-{mode.slug if mode else 'baselines'}"
        path, pictures = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".npz")
        if not path.exists() or (examples and not pictures.exists()):
            made, shown = self._baselines(name) if mode is None else self._measured(name, mode)
            if examples:
                write_atomically(pictures, _npz(shown))
            write_atomically(path, json.dumps(made, indent=1))
        cell: dict[str, Any] = json.loads(path.read_text())
        cell["pictures"] = str(pictures.relative_to(self._out)) if examples else None
        return cell

    def _baselines(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        client, public = self._client(name), self._public_scenes
        labels_N = np.asarray(self._release.public.labels_N)
        of_class = [labels_N == label for label in client.labels_N]
        count = len(client.scenes)
        scenes = {
            BASELINES[0]: _mean(public, [np.ones(len(public), bool)]).pick(np.zeros(count, np.int64)),
            BASELINES[1]: _mean(public, of_class),
            BASELINES[2]: self.basis.scenes(self.basis.coefficients(client.scenes)),
        }
        cell = {
            "kind": "baselines",
            "client": name,
            "seed": self._seed,
            "clips": count,
            "others_of_same_person": len(client.same_person.probabilities_NC),
            "inversion": {key: _inversion(made, client) for key, made in scenes.items()},
            "chance": {"same_class": 0.5, "retrieval": 1 / count, "auc": 0.5},
        }
        shown = _examples(client.labels_N)
        sound, picture = client.scenes.pick(shown), scenes[BASELINES[1]].pick(shown)
        return cell, {
            "spectrograms": sound.spectrograms_NFT,
            "frames": sound.frames_NHWC,
            "mean_spectrograms": picture.spectrograms_NFT,
            "mean_frames": picture.frames_NHWC,
        }

    def _measured(self, name: str, mode: Mode) -> tuple[dict[str, Any], dict[str, Any]]:
        client, attacker = self._client(name), self._attacker(mode)
        upload = self._upload(client, mode)
        shown: dict[str, Any] = {}
        inversion = None
        decoders: tuple[str, ...] = ()
        if attacker.decoder is not None:
            view_KV = attacker_view(upload.rows_KV, in_features=mode.in_features)
            drawn = reconstruct(attacker.decoder, self.basis, view_KV).pick(upload.labels_N)
            inversion, decoders = _inversion(drawn, client), attacker.decoder.names
            few = drawn.pick(_examples(client.labels_N))
            shown = {"spectrograms": few.spectrograms_NFT, "frames": few.frames_NHWC}
        return {
            "kind": "mode",
            "client": name,
            "seed": self._seed,
            "mode": mode.name,
            "slug": mode.slug,
            **{key: value for key, value in asdict(mode).items() if key in ("floor", "epsilon")},
            "upload": mode.kind,
            "clips": len(client.labels_N),
            "rows": len(upload.rows_KV),
            "smallest_cluster": int(upload.sizes_K.min()),
            "message_bytes": upload.message_bytes,
            "inversion": inversion,
            "decoders": list(decoders),
            "membership": self._membership(client, mode, upload, attacker),
            "selection": None if mode.kind == "stranger" else self._selection(client, mode, upload),
        }, shown

    def _upload(self, client: Client, mode: Mode) -> Upload:
        source = client.selection
        if mode.kind == "stranger":
            rng = np.random.default_rng(hash_seed(self._seed, "stranger", client.name))
            shadow_N = self._drawn.member_SN[rng.integers(len(self._drawn.member_SN))]
            source = picked(self._public_outputs(), np.flatnonzero(shadow_N))
        return make_upload(
            mode,
            source,
            seed=self._seed,
            noise_seed=hash_seed(self._seed, "noise", mode.slug, client.name),
            clip_per_cluster=self._release.recipe.personalise.clips_per_cluster,
            labels_N=None,
        )

    def _membership(self, client: Client, mode: Mode, upload: Upload, attacker: _Attacker) -> dict[str, Any]:
        def scores(outputs: StudentOutputs) -> dict[str, Wide]:
            rows_NV = mode_rows(mode, outputs)
            (near_N,) = closeness([upload.rows_KV], rows_NV, attacker.unit)
            base_N = closeness(attacker.shadow_rows, rows_NV, attacker.unit).mean(axis=0)
            return {"distance": near_N, "likelihood ratio": attacker.ratio.score(near_N, base_N)}

        members = scores(client.selection)
        table: dict[str, Any] = {}
        for against, outputs in (("same person", client.same_person), ("others", client.others)):
            if outputs is None or not len(outputs.probabilities_NC):
                continue
            outside = scores(outputs)
            rate = 0.01 if len(outputs.probabilities_NC) >= 100 else 0.05
            for score, inside_N in members.items():
                bootstrap_seed = hash_seed(self._seed, client.name, mode.slug, against, score)
                area = bootstrapped(auc, inside_N, outside[score], seed=bootstrap_seed)
                found = bootstrapped(
                    lambda one, two, rate=rate: true_positive_rate(one, two, rate),  # type: ignore[misc]
                    inside_N,
                    outside[score],
                    seed=bootstrap_seed,
                )
                table[f"{score}, {against}"] = {
                    "auc": asdict(area),
                    "true_positive_rate": asdict(found),
                    "at_false_positive_rate": rate,
                    "non_members": len(outputs.probabilities_NC),
                }
        return table

    def _selection(self, client: Client, mode: Mode, upload: Upload) -> dict[str, float]:
        release = self._release
        config = release.recipe.personalise
        public_NC = release.teacher_outputs.probabilities_NC
        exact_NC = client.selection.probabilities_NC
        told_KC = upload.rows_KV
        if mode.in_features:
            audio_KD, visual_KD = np.split(upload.rows_KV, 2, axis=1)
            told_KC = head_probabilities(release.teacher_head, audio_KD.copy(), visual_KD.copy())
        classes = len(release.recipe.classes)
        true_C = np.bincount(client.labels_N, minlength=classes) / len(client.labels_N)
        estimated_C = (told_KC * upload.sizes_K[:, np.newaxis]).sum(axis=0) / upload.sizes_K.sum()
        wanted_S = select_cosine(exact_NC, public_NC, max(1, round(config.samples_per_row / config.clips_per_cluster)))
        got_S = select_cosine(told_KC, public_NC, max(1, round(len(wanted_S) / len(told_KC))))
        shares_C = np.bincount(release.labels()[got_S], minlength=classes) / len(got_S)
        return {
            "prior_error": float(np.abs(estimated_C - true_C).sum()),
            "prior_error_uniform": float(np.abs(1 / classes - true_C).sum()),
            "overlap": len(np.intersect1d(wanted_S, got_S)) / min(len(wanted_S), len(got_S)),
            "overlap_chance": max(len(wanted_S), len(got_S)) / len(public_NC),
            "selected_class_error": float(np.abs(shares_C - true_C).sum()),
            "selected": len(got_S),
        }

    def _attacker(self, mode: Mode) -> _Attacker:
        if mode.slug not in self._attackers:
            self._attackers.clear()  # the clients of one mode follow each other
            public = self._public_outputs()
            if self._uploads is None:
                per_cluster = self._release.recipe.personalise.clips_per_cluster
                self._uploads = ShadowUploads(public, self._drawn, seed=self._seed, clip_per_cluster=per_cluster)
            decoder = None
            if mode.kind != "stranger":
                targets_NP = self.basis.coefficients(self._public_scenes)
                rows_KV, targets_KP, persons_K = self._uploads.training_pairs(mode, targets_NP)
                decoder = train_decoder(
                    attacker_view(rows_KV, in_features=mode.in_features),
                    targets_KP,
                    persons_K,
                    self.basis.sound_width,
                    seed=hash_seed(self._seed, "decoder", mode.slug) % (1 << 63),
                    device=self._device,
                )
            rows_NV = mode_rows(mode, public)
            unit = float(np.sqrt(rows_NV.var(axis=0).sum())) or 1.0
            shadow_rows = [upload.rows_KV for upload in self._uploads.uploads(mode)]
            closeness_SN = closeness(shadow_rows, rows_NV, unit)
            drawn = self._drawn
            ratio = fit_likelihood_ratio(
                closeness_SN, drawn.member_SN, drawn.pool_SN & ~drawn.member_SN, drawn.stranger_SN
            )
            self._attackers[mode.slug] = _Attacker(decoder, ratio, shadow_rows, unit)
        return self._attackers[mode.slug]

    @property
    def basis(self) -> Basis:
        if self._basis is None:
            self._basis = Basis(self._public_scenes, seed=self._seed)
        return self._basis

    def _client(self, name: str) -> Client:
        clips, (selection, rest) = self._own[name], self._halves[name]
        chosen_N, rest_N = clips.indices(selection), clips.indices(rest)
        outputs = self._client_outputs(name)
        strangers = [self._client_outputs(other) for other in self._own if other != name]
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

    def _client_outputs(self, name: str) -> StudentOutputs:
        return self._cached(f"client-{name}", self._own[name])

    def _public_outputs(self) -> StudentOutputs:
        return self._cached("public", self._release.public)

    def _cached(self, who: str, clips: ClipArrays) -> StudentOutputs:
        """Return the student's outputs, computed once and kept beside the cells."""
        if who not in self._outputs:
            path = self._out / "outputs" / f"{who}-{self._student_hash}-{clips.content_hash[:16]}.npz"
            if not path.exists():
                head = self._release.teacher_head
                made = student_outputs(self._student, head, evaluated_frames_alone(clips), self._device)
                write_atomically(path, _npz(asdict(made)))
            try:
                with np.load(path, allow_pickle=False) as kept:
                    self._outputs[who] = StudentOutputs(**{key: kept[key] for key in kept.files})
            except (ValueError, TypeError, zipfile.BadZipFile) as error:
                raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error
        return self._outputs[who]


def evaluated_frames_alone(clips: ClipArrays) -> ClipArrays:
    """Return the clips with evaluation frames only: the same outputs for a fraction of the work."""
    positions = frame_positions(clips.spec)
    frames_NKHWC = np.stack([np.asarray(clips.frames_NKHWC[row])[positions] for row in range(len(clips))])
    spec = replace(clips.spec, frames_stored=clips.spec.frames_used)
    return replace(clips, frames_NKHWC=frames_NKHWC, spec=spec, source=None)


def _inversion(made: Scenes, client: Client) -> dict[str, float | None]:
    """Return the mean similarity of reconstructions to their clips, and how often they identify their clip.

    A value is None if no class has two clips.
    """
    sound, picture = zip(made.flat(), client.scenes.flat(), strict=True)
    spectrograms = made.spectrograms_NFT[..., np.newaxis], client.scenes.spectrograms_NFT[..., np.newaxis]
    result: dict[str, float | None] = {
        "sound_mse": float(np.square(sound[0] - sound[1]).mean()),
        "picture_mse": float(np.square(picture[0] - picture[1]).mean()),
        "sound_ssim": float(ssim(*spectrograms, SPECTROGRAM_RANGE).mean()),
        "picture_ssim": float(ssim(made.frames_NHWC, client.scenes.frames_NHWC, 1.0).mean()),
    }
    for what, (drawn_NP, true_NP) in (("sound", sound), ("picture", picture)):
        distances_NN = squared_distances(drawn_NP, true_NP)
        rate = same_class_rate(distances_NN, client.labels_N)
        result[f"{what}_same_class"] = None if np.isnan(rate) else rate
        result[f"{what}_retrieval"] = retrieval_rate(distances_NN)
    return result


def _mean(public: Scenes, choices: Sequence[Any]) -> Scenes:
    chosen = [public.pick(np.flatnonzero(choice)) if choice.any() else public for choice in choices]
    return Scenes(
        np.stack([scenes.spectrograms_NFT.mean(axis=0) for scenes in chosen]),
        np.stack([scenes.frames_NHWC.mean(axis=0) for scenes in chosen]),
    )


def _examples(labels_N: Indices, most: int = 6) -> Indices:
    """Return the first clip of each class, then others in order: the same clips in every mode."""
    _, first_N = np.unique(labels_N, return_index=True)
    rest_N = np.setdiff1d(np.arange(len(labels_N)), first_N)
    return np.concatenate([first_N, rest_N])[:most].astype(np.int64)


def _joined(outputs: Sequence[StudentOutputs]) -> StudentOutputs:
    return StudentOutputs(
        np.concatenate([each.audio_ND for each in outputs]),
        np.concatenate([each.visual_ND for each in outputs]),
        np.concatenate([each.probabilities_NC for each in outputs]),
    )


def _npz(arrays: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _line(cell: dict[str, Any]) -> str:
    area = cell["membership"]["distance, same person"]["auc"]["value"]
    rate = (cell["inversion"] or {}).get("picture_same_class")
    picture = "" if rate is None else f", picture identified within its class {100 * rate:.0f} %"
    return f"seed {cell['seed']}, client {cell['client']}, {cell['mode']}: membership AUC {area:.2f}{picture}"
