"""The split of a data set into clips that personalise the student and clips that are then answered."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from isthmus.data.clip import ClipRef, Damage
from isthmus.data.layouts.listing import read_listing
from isthmus.data.splits import latency_halves
from isthmus.edge.capture.sources import read_names


@dataclass(frozen=True)
class ClipPlan:
    """The clips of a run. Labels index ``classes``; ``labelled`` changes them to the cloud's classes."""

    classes: tuple[str, ...]
    selection: tuple[ClipRef, ...]
    test: tuple[ClipRef, ...]
    damaged: tuple[Damage, ...]

    def labelled(self, classes: Sequence[str]) -> "ClipPlan":
        """Return the plan with labels that index ``classes``, by name; an unknown class becomes None."""
        index = {name: position for position, name in enumerate(classes)}

        def relabel(refs: Iterable[ClipRef]) -> tuple[ClipRef, ...]:
            return tuple(
                replace(ref, label=None if ref.label is None else index.get(self.classes[ref.label])) for ref in refs
            )

        return replace(self, classes=tuple(classes), selection=relabel(self.selection), test=relabel(self.test))


def plan_clips(
    data: Path,
    *,
    layout: str = "auto",
    actors: Sequence[str] = (),
    clips: Path | None = None,
    selection_clips: Path | None = None,
    test_clips: Path | None = None,
    seed: int = 0,
) -> ClipPlan:
    """Return the plan: from two files of names, else the device's clips (of the actors or list), halved by class.

    The halves use labels, if file names contain them, only to be balanced and reproducible; labels are never sent.
    Clips without a label count as one class. Clips with only sound or only picture count like any other. Raises
    ValueError that names the missing clips or actors.
    """
    if (selection_clips is None) != (test_clips is None):
        raise ValueError("--selection-clips and --test-clips go together")
    listing = read_listing(data, layout)
    everything = sorted((*listing.refs, *listing.incomplete), key=lambda ref: ref.name)
    known = {ref.name: ref for ref in everything}
    # Damaged clips are known: they are reported as skipped, not as missing.
    damaged = {damage.name for damage in listing.damaged}
    if selection_clips is not None and test_clips is not None:
        selection_names, test_names = read_names(selection_clips), read_names(test_clips)
        both = set(selection_names) & set(test_names)
        if both:
            raise ValueError(f"{len(both)} clips are in both lists, such as {min(both)}")
    else:
        names = [ref.name for ref in everything]
        if actors:
            unknown = set(actors) - {ref.actor for ref in everything}
            if unknown:
                raise ValueError(f"no clips of {', '.join(sorted(unknown))} in {data}")
            names = [ref.name for ref in everything if ref.actor in actors]
        if clips is not None:
            wanted = set(_known(read_names(clips), known, damaged, clips))
            names = [name for name in names if name in wanted]
        labels = [-1 if known[name].label is None else int(known[name].label or 0) for name in names]
        selection_names, test_names = latency_halves(names, labels, seed)
    selection = _known(selection_names, known, damaged, selection_clips or data)
    test = _known(test_names, known, damaged, test_clips or data)
    return ClipPlan(
        classes=listing.classes,
        selection=tuple(known[name] for name in selection),
        test=tuple(known[name] for name in test),
        damaged=tuple(damage for damage in listing.damaged if damage.name in {*selection_names, *test_names}),
    )


def _known(names: Iterable[str], known: dict[str, ClipRef], damaged: set[str], source: Path) -> list[str]:
    names = list(names)
    missing = [name for name in names if name not in known and name not in damaged]
    if missing:
        raise ValueError(f"{source}: {len(missing)} clips are not in the data set, such as {missing[0]}")
    return [name for name in names if name in known]
