"""Who the demo's two clients are: one of all classes and one of few, and which clips are public."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from isthmus.data.clip import ClipRef, Listing
from isthmus.data.layouts import ave
from isthmus.data.splits import Split, stratified

LEAST_CLIPS: Final = 6
"""Fewest clips of a client: half of them must make one prototype of three clips."""
LEAST_PUBLIC_PEOPLE: Final = 8
"""With fewer people on the public side there is no person model, so clients need not be people."""
SHARES: Final = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Shares of a data set that are private if its people cannot be the clients: the first that suffices for both."""
MANIFEST: Final = "manifest.csv"


def choose_clients(listing: Listing, root: Path, *, people: Sequence[str] = (), seed: int = 0) -> Split:
    """Return the public clips and those of two clients. The first has all its classes, the second every second one.

    ``people`` names both clients. Without it, a data set of at least ten people gives two of them: the first two of
    role (or split) "private" in manifest.csv if the folder has one, and then nobody of that role is public; else the
    last two. In a data set of fewer people the clips of testSet.txt are private (AVE), or the smallest of ``SHARES`` of
    all clips that suffices, and each client gets half of the clips of the second client's classes. Raises ValueError
    for unknown people, and for a client with too few clips.
    """
    known = sorted({ref.actor for ref in listing.refs if ref.actor is not None})
    unknown = [name for name in people if name not in known]
    if unknown or len(people) not in (0, 2) or len(set(people)) != len(people):
        names = ", ".join(known) or "this data set names nobody"
        raise ValueError(f"--people takes the names of two people with clips here: {names}")
    kept = _private_clips(root / MANIFEST)
    reserved = {ref.actor for ref in listing.refs if ref.name in kept and ref.actor is not None}
    chosen = list(people) or (sorted(reserved) if len(reserved) >= 2 else known[-2:])[:2]
    public_people = set(known) - reserved - set(chosen)
    if people or len(public_people) >= LEAST_PUBLIC_PEOPLE:
        clients = {name: [ref for ref in listing.refs if ref.actor == name] for name in chosen}
        clients[chosen[1]] = _of_few(clients[chosen[1]])
        public = [ref for ref in listing.refs if ref.actor in public_people]
        split = _split("demo, by person", public, clients)
    else:
        split = _by_share(listing, root, seed)
    few = [f"{name} would have {len(clips)}" for name, clips in split.clients.items() if len(clips) < LEAST_CLIPS]
    if few or len(split.public) < LEAST_CLIPS:
        who = " and ".join(few) or f"the public side would have {len(split.public)}"
        raise ValueError(
            f"{who} of the {len(listing.refs)} clips here, and {LEAST_CLIPS} are needed: half of them to learn from, "
            "half to test. Add clips of every class"
            + (", or name two people who have more with --people" if known else "")
        )
    return split


def _by_share(listing: Listing, root: Path, seed: int) -> Split:
    """Return the first of several private sets that gives both clients enough clips; none does: the last one."""
    drawn = [stratified(listing.refs, share=share, seed=seed) for share in SHARES]
    if listing.layout == ave.LAYOUT:
        drawn.insert(0, ave.read_lists(root)[ave.PRIVATE_LIST])
    split = Split("", (), {})
    for names in drawn:
        split = _shared(listing, set(names))
        if min(map(len, split.clients.values())) >= LEAST_CLIPS:
            break
    return split


def _shared(listing: Listing, names: set[str]) -> Split:
    """Return two clients who share the private clips ``names``. A recording with several events gives one clip."""
    one_of = {_recording(ref): ref for ref in reversed(listing.refs) if ref.name in names}
    private = [ref for ref in listing.refs if one_of.get(_recording(ref)) is ref]
    of_class: dict[int | None, list[ClipRef]] = {}
    for ref in _of_few(private):
        of_class.setdefault(ref.label, []).append(ref)
    half = {ref.name for refs in of_class.values() for ref in refs[1::2]}
    clients = {
        "client_1": [ref for ref in private if ref.name not in half],
        "client_2": [ref for ref in private if ref.name in half],
    }
    return _split("demo, by class", [ref for ref in listing.refs if _recording(ref) not in one_of], clients)


def _recording(ref: ClipRef) -> Path | None:
    return ref.video_path or ref.audio_path


def _of_few(refs: Sequence[ClipRef]) -> list[ClipRef]:
    """Return the clips of every second class; all of them if there are three classes or fewer."""
    labels = sorted({ref.label for ref in refs if ref.label is not None})
    kept = set(labels if len(labels) <= 3 else labels[1::2])
    return [ref for ref in refs if ref.label in kept]


def _private_clips(manifest: Path) -> set[str]:
    """Return the clips that a manifest with columns ``clip`` and ``role`` (or ``split``) keeps for clients."""
    if not manifest.is_file():
        return set()
    with manifest.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
    return {str(row.get("clip")) for row in rows if "private" in (row.get("role"), row.get("split"))}


def _split(name: str, public: Sequence[ClipRef], clients: dict[str, list[ClipRef]]) -> Split:
    return Split(
        name,
        tuple(sorted(ref.name for ref in public)),
        {client: tuple(sorted(ref.name for ref in refs)) for client, refs in clients.items()},
    )
