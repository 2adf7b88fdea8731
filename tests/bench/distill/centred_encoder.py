"""Does a picture encoder that is trained on features centred per person help strangers, once the offset is applied?

An ordinary encoder is trained on random batches. A centred one is trained on batches of four people with 16 clips each,
whose features lose what the person's clips share before the head sees them. Both take as many steps. Of the people left
out, half of the clips give the offset and the others are answered, by pictures alone. An experiment, not part of
``make bench``; every fold is a file, so a stopped run goes on.

Axes: B batch, N clips, P people of a batch, D feature width, C classes, K frames.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import numpy.typing as npt
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from isthmus.data.cache.read import ClipArrays
from isthmus.data.files import write_atomically
from isthmus.data.transforms import evaluation_frames, training_frames
from isthmus.distill.models.trunk import Encoder
from isthmus.distill.prepare import decode, read_data, recipe_for
from isthmus.distill.student.centred import fit_centred
from isthmus.edge.own_clips.offset import answer, estimate
from isthmus.experiments.personal.findings.paired import difference, spread
from tests.bench import THREADS

VARIANTS: Final = ("ordinary", "centred")
PEOPLE: Final = 4
EACH: Final = 16
WIDTH: Final = 128

Rows = npt.NDArray[np.int64]


def main(
    data: Annotated[Path, typer.Option(help="A data set whose clips name their actors, such as RavFace.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    folds: Annotated[int, typer.Option(help="Number of folds of four people, of those that there are.")] = 5,
    epochs: Annotated[int, typer.Option(help="Passes over the public clips.")] = 24,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
) -> None:
    """Train both encoders without each fold's people, and measure their pictures before and after the offset."""
    torch.set_num_threads(THREADS)
    listing = read_data(data)
    clips = decode(listing, [ref.name for ref in listing.refs], recipe_for(listing, "demo"), out / "clips")
    actors = np.array(clips.actors)
    people = sorted(set(actors))
    found: dict[str, dict[str, dict[str, float]]] = {variant: {} for variant in VARIANTS}
    for fold in range(folds):
        left_out = people[4 * fold : 4 * fold + 4]
        for variant in VARIANTS:
            path = out / f"{variant}-{seed}-{epochs}-{'-'.join(left_out)}.json"
            if not path.exists():
                public_N = np.flatnonzero(~np.isin(actors, left_out))
                encoder = trained(clips, public_N, variant == "centred", epochs, seed)
                measured = of_people(encoded(encoder, clips), clips, public_N, left_out, seed)
                write_atomically(path, json.dumps(measured))
            found[variant] |= json.loads(path.read_text())
            typer.echo(f"{variant} {left_out}: {json.loads(path.read_text())}", err=True)
    for how in ("head", "offset", "own mean"):
        by_variant = {variant: {name: rows[how] for name, rows in found[variant].items()} for variant in VARIANTS}
        means = ", ".join(f"{name} {100 * spread(list(rows.values())).mean:.1f} %" for name, rows in by_variant.items())
        gap = difference(by_variant["centred"], by_variant["ordinary"])
        typer.echo(f"{how}: {means}; centred less ordinary {100 * gap.mean:+.1f} ± {100 * gap.standard_error:.1f}")
    write_atomically(out / "result.json", json.dumps({"epochs": epochs, "seed": seed, "people": found}, indent=1))


def trained(clips: ClipArrays, public_N: Rows, centred: bool, epochs: int, seed: int) -> Encoder:
    """Return a picture encoder trained on the public rows with cross-entropy."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    encoder = Encoder("resnet18-quarter", 3, WIDTH, neck=True).train()
    head = nn.Linear(WIDTH, len(clips.classes))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.05)
    steps = epochs * math.ceil(len(public_N) / (PEOPLE * EACH))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    labels_N, actors = np.asarray(clips.labels_N), np.array(clips.actors)
    for _ in range(steps):
        if centred:
            drawn = rng.choice(np.unique(actors[public_N]), PEOPLE, replace=False)
            rows_B = np.concatenate([rng.choice(public_N[actors[public_N] == each], EACH, False) for each in drawn])
        else:
            rows_B = rng.choice(public_N, PEOPLE * EACH, replace=False)
        frames = np.stack(
            [training_frames(clips.frames_NKHWC[row], clips.spec, rng, crop_scale=(0.7, 1)) for row in rows_B]
        )
        features_BD = encoder(torch.from_numpy(frames).flatten(0, 1)).unflatten(0, frames.shape[:2]).mean(dim=1)
        labels_B = torch.from_numpy(labels_N[rows_B])
        if centred:
            features_BD = features_BD - shared(features_BD, labels_B)
        loss = functional.cross_entropy(head(features_BD), labels_B, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return encoder.eval()


def shared(features_BD: Tensor, labels_B: Tensor) -> Tensor:
    """Return what each person's clips share (B, D): the mean of what the classes' means do not explain."""
    of_class_BC = functional.one_hot(labels_B).to(features_BD.dtype)
    means_CD = (of_class_BC.T @ features_BD) / of_class_BC.sum(dim=0).clamp(min=1).unsqueeze(1)
    rest_PED = (features_BD - means_CD[labels_B]).unflatten(0, (PEOPLE, EACH))
    return rest_PED.mean(dim=1).repeat_interleave(EACH, dim=0)


@torch.inference_mode()
def encoded(encoder: Encoder, clips: ClipArrays) -> npt.NDArray[np.float32]:
    """Return features_ND of every clip, frames as in evaluation."""
    found = []
    for first in range(0, len(clips), 64):
        rows = range(first, min(first + 64, len(clips)))
        frames = torch.from_numpy(np.stack([evaluation_frames(clips.frames_NKHWC[row], clips.spec) for row in rows]))
        found.append(encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).mean(dim=1).numpy())
    return np.concatenate(found)


def of_people(
    features_ND: npt.NDArray[np.float32], clips: ClipArrays, public_N: Rows, left_out: list[str], seed: int
) -> dict[str, dict[str, float]]:
    """Return person -> accuracy of an ordinary head, of centred heads with the offset that the device would estimate,
    and of these without the mean of the person's own clips, which knows that all classes are equally frequent."""
    from sklearn.linear_model import LogisticRegression

    labels_N, actors = np.asarray(clips.labels_N), np.array(clips.actors)
    made = fit_centred(
        features_ND[np.newaxis, public_N], np.ones((len(public_N), 1)), labels_N[public_N], actors[public_N].tolist()
    )
    spread_D = features_ND[public_N].std(axis=0) + 1e-3
    ordinary = LogisticRegression(C=0.01, max_iter=500).fit(features_ND[public_N] / spread_D, labels_N[public_N])
    rng = np.random.default_rng(seed)
    found = {}
    for person in left_out:
        rows = rng.permutation(np.flatnonzero(actors == person))
        own_S, test_T = rows[::2], rows[1::2]
        raw_NC = ordinary.predict_proba(features_ND / spread_D)
        logits_MNC = made.heads.logits(features_ND[np.newaxis])
        there = np.ones((len(rows), 1), np.float32)
        offset = estimate(logits_MNC[:, own_S], there[: len(own_S)], raw_NC[own_S], made.person)
        told = {
            "head": raw_NC[test_T],
            "offset": answer(logits_MNC[:, test_T], there[: len(test_T)], offset),
            "own mean": (logits_MNC[:, test_T] - logits_MNC[:, own_S].mean(axis=1, keepdims=True))[0],
        }
        found[person] = {how: float((each.argmax(axis=1) == labels_N[test_T]).mean()) for how, each in told.items()}
    return found


if __name__ == "__main__":
    typer.run(main)
