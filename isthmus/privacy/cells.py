"""One cell: what one upload of one client reveals to anyone who holds it, or what is known without any upload."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from isthmus.distill.selection import select_cosine
from isthmus.distill.student.evaluate import StudentOutputs
from isthmus.distill.training.teacher_cache import head_probabilities
from isthmus.privacy.attacks import (
    Scenes,
    attacker_view,
    closeness,
    reconstruct,
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
from isthmus.privacy.material import Attacker, Client, Material
from isthmus.privacy.shadows import hash_seed
from isthmus.privacy.uploads import Indices, Mode, Upload, Wide, mode_rows

SPECTROGRAM_RANGE = 6.0
"""Data range of the spectrogram's SSIM: three standard deviations in each direction."""
BASELINES = ("mean public clip", "mean public clip of the class", "the decoder's own limit")


def baselines(material: Material, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the cell of one client without any upload, and its pictures."""
    client, public = material.client(name), material.public_scenes
    labels_N = np.asarray(material.release.public.labels_N)
    of_class = [labels_N == label for label in client.labels_N]
    count = len(client.scenes)
    scenes = {
        BASELINES[0]: _mean(public, [np.ones(len(public), bool)]).pick(np.zeros(count, np.int64)),
        BASELINES[1]: _mean(public, of_class),
        BASELINES[2]: material.basis.scenes(material.basis.coefficients(client.scenes)),
    }
    cell = {
        "kind": "baselines",
        "client": name,
        "seed": material.seed,
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


def measured(material: Material, name: str, mode: Mode) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the cell of one client and mode, and the pictures that the attack drew."""
    client, attacker = material.client(name), material.attacker(mode)
    upload = material.upload(client, mode)
    shown: dict[str, Any] = {}
    inversion = None
    decoders: tuple[str, ...] = ()
    if attacker.decoder is not None:
        view_KV = attacker_view(upload.rows_KV, in_features=mode.in_features)
        drawn = reconstruct(attacker.decoder, material.basis, view_KV).pick(upload.labels_N)
        inversion, decoders = _inversion(drawn, client), attacker.decoder.names
        few = drawn.pick(_examples(client.labels_N))
        shown = {"spectrograms": few.spectrograms_NFT, "frames": few.frames_NHWC}
    return {
        "kind": "mode",
        "client": name,
        "seed": material.seed,
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
        "membership": _membership(material, client, mode, upload, attacker),
        "selection": None if mode.kind == "stranger" else _selection(material, client, mode, upload),
    }, shown


def _membership(material: Material, client: Client, mode: Mode, upload: Upload, attacker: Attacker) -> dict[str, Any]:
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
            bootstrap_seed = hash_seed(material.seed, client.name, mode.slug, against, score)
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


def _selection(material: Material, client: Client, mode: Mode, upload: Upload) -> dict[str, float]:
    release = material.release
    config = release.recipe.personalise
    public_NC = release.teacher_outputs.probabilities_NC
    exact_NC = client.selection.probabilities_NC
    sent_KC = upload.rows_KV
    if mode.in_features:
        audio_KD, visual_KD = np.split(upload.rows_KV, 2, axis=1)
        sent_KC = head_probabilities(release.teacher_head, audio_KD.copy(), visual_KD.copy())
    classes = len(release.recipe.classes)
    true_C = np.bincount(client.labels_N, minlength=classes) / len(client.labels_N)
    estimated_C = (sent_KC * upload.sizes_K[:, np.newaxis]).sum(axis=0) / upload.sizes_K.sum()
    wanted_S = select_cosine(exact_NC, public_NC, max(1, round(config.samples_per_row / config.clips_per_cluster)))
    got_S = select_cosine(sent_KC, public_NC, max(1, round(len(wanted_S) / len(sent_KC))))
    shares_C = np.bincount(release.labels()[got_S], minlength=classes) / len(got_S)
    return {
        "prior_error": float(np.abs(estimated_C - true_C).sum()),
        "prior_error_uniform": float(np.abs(1 / classes - true_C).sum()),
        "overlap": len(np.intersect1d(wanted_S, got_S)) / min(len(wanted_S), len(got_S)),
        "overlap_chance": max(len(wanted_S), len(got_S)) / len(public_NC),
        "selected_class_error": float(np.abs(shares_C - true_C).sum()),
        "selected": len(got_S),
    }


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
