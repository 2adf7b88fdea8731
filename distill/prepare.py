"""From a data folder to a release: choose public clips and clients, and decode the public clips."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from isthmus.data.cache.build import build_arrays
from isthmus.data.cache.read import ClipArrays
from isthmus.data.clip import Listing
from isthmus.data.files import write_atomically
from isthmus.data.layouts.listing import read_listing
from isthmus.data.splits import Split, by_actor, by_class, published
from isthmus.distill.models import pretrained
from isthmus.distill.models.pretrained import PretrainedTrunk
from isthmus.distill.recipes import PRESETS, Recipe, on_trunks
from isthmus.distill.release import Release, ReleaseError


def choose_split(
    listing: Listing,
    *,
    private_actors: Sequence[str] = (),
    private_list: Path | None = None,
    split_file: Path | None = None,
    seed: int = 0,
) -> Split:
    """Return the split: by person if actors are named, by a published list or a split's file if one is given, else the
    paper's, drawn with ``seed``.

    Raises ValueError if the arguments do not fit the data.

    >>> choose_split(listing, private_actors=["1001"]).clients["1001"][0]
    '1001_DFA_ANG_XX'
    """
    if bool(private_actors) + (private_list is not None) + (split_file is not None) > 1:
        raise ValueError("name private actors or give a list of private clips or a split, one of the three")
    if split_file is not None:
        split = Split.from_json(split_file.read_text())
        missing = {*split.public, *split.private} - {ref.name for ref in listing.refs}
        if missing:
            raise ValueError(f"{split_file}: {len(missing)} clips are not in the data set, such as {min(missing)}")
        return split
    if private_actors:
        return by_actor(listing, private_actors)
    if private_list is not None:
        return published(listing, private_list)
    return by_class(listing, seed=seed)


def recipe_for(
    listing: Listing,
    preset: str,
    held_out: float | None = None,
    balance: str | None = None,
    trunks: tuple[PretrainedTrunk, PretrainedTrunk] | None = None,
    modality_dropout: float | None = None,
    student_trunk: str | None = None,
    student_precision: Literal["fp32", "int8"] = "fp32",
) -> Recipe:
    """Return the preset, with ``held_out``, ``balance``, ``modality_dropout`` and the trunks of the teacher replaced if
    they are given, and with the number type of exported students: float32 unless it is given, as experiments have it;
    ``isthmus distill teacher`` gives int8.

    With ``trunks`` the student shares the teacher's encoders, unless ``student_trunk`` names a ResNet of its own.
    Raises ValueError for an unknown preset, layout or balance, a share outside [0, 1), a dropout outside [0, 0.5], and
    a student's trunk without ``trunks``.

    >>> recipe_for(listing, "smoke").student_trunk
    'resnet18'
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    if listing.layout not in ("crema-d", "ave"):
        raise ValueError(f"no recipe for layout {listing.layout!r}")
    recipe = PRESETS[preset](cast(Literal["crema-d", "ave"], listing.layout), listing.classes)
    recipe = dataclasses.replace(recipe, student_precision=student_precision)
    changes: dict[str, Any] = {"held_out": held_out, "balance": balance}
    changed = {name: value for name, value in changes.items() if value is not None}
    recipe = dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, **changed))
    if modality_dropout is not None:
        recipe = dataclasses.replace(recipe, modality_dropout=modality_dropout)
    if trunks is None:
        if student_trunk is not None:
            raise ValueError("a student's trunk is chosen for a teacher on pretrained trunks; else the preset has it")
        return recipe
    return on_trunks(recipe, *trunks, student_trunk=student_trunk)


FoundTrunks = tuple[tuple[PretrainedTrunk, PretrainedTrunk], tuple[Path, Path]]
"""The trunks of sound and picture, and their files."""


def find_trunks(sound: str | None, picture: str | None) -> FoundTrunks | None:
    """Return both pretrained trunks and their files, from names or paths; None if neither is asked for.

    Raises ValueError if one of them is missing.
    """
    if sound is None and picture is None:
        return None
    if sound is None or picture is None:
        raise ValueError("--sound-trunk and --picture-trunk go together: the student uses both")
    sound_trunk, sound_file = pretrained.find(sound, pretrained.SOUND)
    picture_trunk, picture_file = pretrained.find(picture, pretrained.PICTURE)
    return (sound_trunk, picture_trunk), (sound_file, picture_file)


def begun_precision(root: Path) -> Literal["fp32", "int8"] | None:
    """Return the number type of students with which a release was begun at ``root``; None if none was.

    A release goes on as it was begun, also where another version of Isthmus with another default began it.
    """
    return Release.open(root).recipe.student_precision if (root / "recipe.json").exists() else None


def begin_release(root: Path, listing: Listing, recipe: Recipe, split: Split, *, progress: bool = True) -> Release:
    """Write recipe and split, and decode the public clips into the release.

    Raises ReleaseError if the folder was begun with another recipe or split.

    >>> split = choose_split(listing, private_actors=["1003"])
    >>> begun = begin_release(folder / "release", listing, recipe, split, progress=False)
    >>> set(begun.public.names) == set(split.public)
    True
    """
    release = Release.create(root, recipe)
    path = root / "split.json"
    if path.exists() and Split.from_json(path.read_text()) != split:
        raise ReleaseError(f"{root} was begun with another split of the data. Choose another --release folder.")
    write_atomically(path, split.to_json())
    release.set_public(decode(listing, split.public, recipe, release.public_dir, progress=progress))
    return release


def beside(first: Release, root: Path) -> Release:
    """Open the release at ``root``, or begin it with the recipe, the split and the decoded public clips of another.

    Raises ReleaseError if the folder holds a release of another recipe.
    """
    release = Release.create(root, first.recipe)
    write_atomically(root / "split.json", (first.root / "split.json").read_text())
    if not (root / "public.json").exists():
        folder = first.public.folder
        shutil.copytree(folder, release.public_dir / folder.relative_to(first.public_dir), dirs_exist_ok=True)
        write_atomically(root / "public.json", (first.root / "public.json").read_text())
    return release


def release_split(release: Release) -> Split:
    """Return the split that the release was begun with. Raises ReleaseError if there is none."""
    try:
        return Split.from_json((release.root / "split.json").read_text())
    except FileNotFoundError as error:
        raise ReleaseError(f"{release.root} has no split.json: run 'isthmus distill teacher' first.") from error


def decode(
    listing: Listing, names: Sequence[str], recipe: Recipe, cache_dir: Path, *, progress: bool = True
) -> ClipArrays:
    """Decode the named clips as the recipe reads them. Raises ValueError if the listing lacks one of them."""
    by_name = {ref.name: ref for ref in listing.refs}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ValueError(
            f"the data set lacks {len(missing)} of the release's clips, such as {missing[0]}: "
            "give the data set that the release was begun with"
        )
    return build_arrays([by_name[name] for name in names], listing.classes, recipe.input, cache_dir, progress)


def read_data(root: Path, layout: str = "auto") -> Listing:
    """Return the listing of ``read_listing``, with errors of one line for a command to show. Raises ValueError."""
    if not root.is_dir():
        raise ValueError(
            f"{root} is not a folder. 'isthmus data make crema-d {root}' makes a synthetic data set there."
        )
    return read_listing(root, layout)
