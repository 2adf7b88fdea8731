"""Gain of a teacher's head that is fitted on clips held out from its branches.

This is an experiment on a trained release and no part of ``make bench``. It needs no new training: in turn, the head is
fitted on the clips of one client of the release's split and measured on those of the other clients.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.special import log_softmax

from isthmus.distill.prepare import decode, read_data, release_split
from isthmus.distill.release import Release, ReleaseError
from isthmus.distill.teacher.held_out import DECAY, MASKS, Held, fit_weights
from isthmus.distill.training.teacher_cache import encode_clips, evaluation_mean
from tests.bench import THREADS
from tests.bench.harness import Report


def main(
    release: Annotated[Path, typer.Option(help="A release with a teacher of linear fusion, two clients or more.")],
    data: Annotated[Path, typer.Option(help="The data set of the release.")],
    decays: Annotated[
        str, typer.Option(help="Strengths of the pull towards the initial weights, separated by commas.")
    ] = f"10,3,{DECAY:g},0.3,0.1",
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Measure joint, sound-only and picture-only accuracy, and cross-entropy, on held-out clients."""
    torch.set_num_threads(THREADS)
    try:
        opened = Release.open(release)
    except ReleaseError as error:
        raise typer.BadParameter(str(error)) from error
    teacher, listing = opened.teacher, read_data(data)
    of_client: dict[str, Held] = {}
    for client, names in release_split(opened).clients.items():
        clips = decode(listing, names, opened.recipe, release / "private")
        audio_ND, visual_NKD = encode_clips(teacher.encoders, clips, torch.device("cpu"))
        features_NMD = np.stack([audio_ND, evaluation_mean(visual_NKD, clips)], axis=1).astype(np.float64)
        of_client[client] = Held(features_NMD, clips.labels_N, np.zeros(len(clips), np.int64))
    stored = teacher.head.linear()
    if stored is None:
        raise SystemExit(f"fusion {opened.recipe.fusion!r} is not linear")
    branches = (teacher.audio_classifier, teacher.visual_classifier)
    start_MCD = np.stack([branch.weight.detach().double().numpy() for branch in branches])
    bias_C = sum(branch.bias.detach().double().numpy() for branch in branches)
    stored_MCD = np.stack([each.detach().double().numpy() for each in stored[:2]])
    report = Report("unseen_head", {"release": opened.recipe.name, "decays": decays}, ("torch", "scipy"))
    report.rows.append(measured("the release's head", of_client, dict.fromkeys(of_client, stored_MCD), stored[2]))
    report.rows.append(measured("sum of the branches", of_client, dict.fromkeys(of_client, start_MCD), bias_C))
    for decay in map(float, decays.split(",")):
        fitted = {
            client: np.mean(
                [
                    fit_weights(seen, start_MCD, bias_C, opened.recipe.modality_dropout, decay)
                    for other, seen in of_client.items()
                    if other != client
                ],
                axis=0,
            )
            for client in of_client
        }
        report.rows.append(measured(f"fitted on another client, decay {decay:g}", of_client, fitted, bias_C))
    report.finish(
        {
            "head": lambda row: str(row["head"]),
            **{
                name: lambda row, name=name: f"{100 * row[name]:.1f}"  # type: ignore[misc]
                for name in ("both", "sound", "picture")
            },
            "cross-entropy": lambda row: f"{row['cross_entropy']:.3f}",
            "clips": lambda row: str(row["clips"]),
        },
        out,
    )


def measured(head: str, of_client: dict[str, Held], weights: dict[str, Any], bias_C: Any) -> dict[str, Any]:
    """Return accuracy over all clients' clips by the modalities present, and the mean cross-entropy with both."""
    labels_N = np.concatenate([held.labels_N for held in of_client.values()])
    bias_C = np.asarray(bias_C.detach() if isinstance(bias_C, torch.Tensor) else bias_C)
    parts_NMC = np.concatenate(
        [np.einsum("nmd,mcd->nmc", held.features_NMD, weights[client]) for client, held in of_client.items()]
    )
    by_mask = [np.einsum("nmc,m->nc", parts_NMC, np.asarray(mask)) + bias_C for mask in MASKS]
    both, sound, picture = (float((logits_NC.argmax(axis=1) == labels_N).mean()) for logits_NC in by_mask)
    surprise_N = -log_softmax(by_mask[0], axis=1)[np.arange(len(labels_N)), labels_N]
    return {
        "head": head,
        "both": both,
        "sound": sound,
        "picture": picture,
        "cross_entropy": float(surprise_N.mean()),
        "clips": len(labels_N),
    }


if __name__ == "__main__":
    typer.run(main)
