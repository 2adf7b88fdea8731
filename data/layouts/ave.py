"""AVE's published layout (Tian et al., ECCV 2018): AVE/<youtube-id>.mp4 and lists of `label&id&quality&start&end`."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from isthmus.data.clip import ClipRef, Damage, Listing

LAYOUT: Final = "ave"
VIDEO_FOLDER: Final = "AVE"
ANNOTATIONS: Final = "Annotations.txt"
PUBLIC_LISTS: Final = ("trainSet.txt", "valSet.txt")
PRIVATE_LIST: Final = "testSet.txt"
LISTS: Final = (*PUBLIC_LISTS, PRIVATE_LIST)

_VIDEO_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
MAX_EVENT_END_S: Final = 3600.0


@dataclass(frozen=True, order=True)
class Event:
    """One line of a list: what is seen and heard in a video, from when to when."""

    category: str
    video_id: str
    quality: str
    start_s: float
    end_s: float


def parse_line(line: str) -> Event:
    """Raises ValueError saying what is wrong with the line."""
    fields = [field.strip() for field in line.split("&")]
    if len(fields) != 5:
        raise ValueError(f"{len(fields)} fields instead of the five of label&id&quality&start&end")
    category, video_id, quality, start, end = fields
    if not category:
        raise ValueError("the label is empty")
    if not _VIDEO_ID.fullmatch(video_id):
        raise ValueError(f"'{video_id[:64]}' is no video id")
    try:
        start_s, end_s = float(start), float(end)
    except ValueError:
        raise ValueError(f"'{start}' or '{end}' is no time in seconds") from None
    if not 0 <= start_s < end_s <= MAX_EVENT_END_S:
        raise ValueError(f"an event cannot last from {start_s:g} s to {end_s:g} s")
    return Event(category, video_id, quality, start_s, end_s)


def read(root: Path) -> Listing:
    """Lists the events of the three lists, sorted by name, without opening the videos.

    Classes come in order of first appearance in testSet.txt, then (for lists that are no split of one data set) in
    the others. A clip is named by its video; where a video carries several categories, by ``video#category``.
    Lines that do not parse and events whose video is missing are listed as damaged.
    Raises ValueError naming a list that is missing.
    """
    damaged: list[Damage] = []
    events_of = {name: _events(root, name, damaged) for name in LISTS}
    by_test_first = [event for name in (PRIVATE_LIST, *PUBLIC_LISTS) for event in events_of[name]]
    classes = tuple(dict.fromkeys(event.category for event in by_test_first))
    refs: list[ClipRef] = []
    for name, event in _named(events_of).items():
        path = root / VIDEO_FOLDER / f"{event.video_id}.mp4"
        if path.is_file():
            label = classes.index(event.category)
            refs.append(ClipRef(name, path, path, label, None, event.start_s, event.end_s))
        else:
            damaged.append(Damage(name, f"no sound and no picture: {VIDEO_FOLDER}/{path.name} is missing"))
    return Listing(LAYOUT, classes, tuple(sorted(refs, key=lambda ref: ref.name)), tuple(damaged))


def read_lists(root: Path) -> dict[str, tuple[str, ...]]:
    """The clip names of each published list, by the list's file name. Raises ValueError naming a missing list."""
    events_of = {name: _events(root, name, []) for name in LISTS}
    names = {event: name for name, event in _named(events_of).items()}
    return {
        name: tuple(sorted({names[event] for event in events if event in names})) for name, events in events_of.items()
    }


def _named(events_of: dict[str, list[Event]]) -> dict[str, Event]:
    """Each distinct event under a name that is unique and does not depend on the order of the lists."""
    events = sorted({event for events in events_of.values() for event in events})
    in_video = Counter(event.video_id for event in events)
    in_category = Counter((event.video_id, event.category) for event in events)
    named: dict[str, Event] = {}
    for event in events:
        name = event.video_id
        if in_video[event.video_id] > 1:
            name += f"#{event.category}"
        if in_category[event.video_id, event.category] > 1:
            name += f"#{event.start_s:g}-{event.end_s:g}"
        named.setdefault(name, event)
    return named


def _events(root: Path, name: str, damaged: list[Damage]) -> list[Event]:
    path = root / name
    if not path.is_file():
        raise ValueError(f"{path} is missing: the AVE layout has the lists {', '.join(LISTS)} beside {VIDEO_FOLDER}/")
    events: list[Event] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        if not line.strip() or line.startswith("Category&"):
            continue
        try:
            events.append(parse_line(line))
        except ValueError as error:
            damaged.append(Damage(f"{name}:{number}", str(error)))
    return events
