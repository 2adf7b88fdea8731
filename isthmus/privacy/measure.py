"""Both attacks on every mode, client and seed, and what each mode reveals to the cloud. Each cell is resumable."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from isthmus.data.clip import Listing
from isthmus.data.files import write_atomically
from isthmus.data.made_by import made_by
from isthmus.data.splits import Split
from isthmus.distill.prepare import decode
from isthmus.distill.release import Release
from isthmus.privacy.attacks import (
    scenes_of,
)
from isthmus.privacy.cells import baselines, measured
from isthmus.privacy.material import Material, npz
from isthmus.privacy.shadows import SHADOWS
from isthmus.privacy.uploads import Mode

Report = Callable[[str], None]


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
    made = made_by(out, report)
    public_scenes = scenes_of(release.public)
    cells: list[dict[str, Any]] = []
    skipped: list[str] = []
    for seed in seeds:
        material = Material(release, own, public_scenes, split.name == "by-actor", seed=seed, out=out, device=device)
        for name in chosen:
            if material.selection_sizes[name] >= 2:
                cells.append(_cell(material, out, name, None, examples=seed == seeds[0]))
            advance(1)
        for mode in modes:
            for name in chosen:
                enough = min(material.selection_sizes[name], material.shadow_size)
                if max(mode.floor, 2) > enough:
                    skipped.append(f"{mode.name}, client {name}, seed {seed}: {enough} clips are too few")
                    report("skipped: " + skipped[-1])
                else:
                    cells.append(_cell(material, out, name, mode, examples=seed == seeds[0]))
                    report(_line(cells[-1]))
                advance(1)
    if not any(cell["kind"] == "mode" for cell in cells):
        raise ValueError("no mode could be measured: every floor is larger than the number of clips. Lower --floors.")
    return {
        "what": "what someone who holds an upload can learn, by mode",
        "code": made,
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


def _cell(material: Material, out: Path, name: str, mode: Mode | None, *, examples: bool) -> dict[str, Any]:
    """Return the cell of one client and mode, or of its baselines. Read it if it was measured before."""
    stem = out / "cells" / material.key / f"{name}-{mode.slug if mode else 'baselines'}"
    path, pictures = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".npz")
    if not path.exists() or (examples and not pictures.exists()):
        made, shown = baselines(material, name) if mode is None else measured(material, name, mode)
        if examples:
            write_atomically(pictures, npz(shown))
        write_atomically(path, json.dumps(made, indent=1))
    cell: dict[str, Any] = json.loads(path.read_text())
    cell["pictures"] = str(pictures.relative_to(out)) if examples else None
    return cell


def _line(cell: dict[str, Any]) -> str:
    area = cell["membership"]["distance, same person"]["auc"]["value"]
    rate = (cell["inversion"] or {}).get("picture_same_class")
    picture = "" if rate is None else f", picture identified within its class {100 * rate:.0f} %"
    return f"seed {cell['seed']}, client {cell['client']}, {cell['mode']}: membership AUC {area:.2f}{picture}"
