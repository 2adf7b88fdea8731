"""AVE's published layout (Tian et al., ECCV 2018): AVE/<youtube-id>.mp4 and lists of `label&id&quality&start&end`."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from isthmus.data.clip import ClipRef, Damage, Listing
from isthmus.data.files import read_text
from isthmus.data.layouts.folder import FILM, MediaFolder

LAYOUT: Final = "ave"
VIDEO_FOLDER: Final = "AVE"
ANNOTATIONS: Final = "Annotations.txt"
PUBLIC_LISTS: Final = ("trainSet.txt", "valSet.txt")
PRIVATE_LIST: Final = "testSet.txt"
LISTS: Final = (*PUBLIC_LISTS, PRIVATE_LIST)
ENDINGS: Final = (".mp4", *(ending for ending in FILM if ending != ".mp4"))

_VIDEO_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
MAX_EVENT_END_S: Final = 3600.0


@dataclass(frozen=True, order=True)
class Event:
    """One line of a list: the category of an event, its video, and when it begins and ends."""

    category: str
    video_id: str
    quality: str
    start_s: float
    end_s: float


def parse_line(line: str) -> Event:
    """Return the event of a line. Raises ValueError that says what is wrong with the line."""
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
    """List the events of the three lists, sorted by name, without opening the videos.

    Classes are in order of first appearance in testSet.txt, then in the others (for lists that are not a split of one
    data set). A clip is named after its video, or ``video#category`` if a video has several categories. Other endings
    of films, in upper or lower case, are read too if there is no .mp4. Lines that do not parse, events whose video is
    missing and links whose target is not here are listed as damaged; videos in no list and other files as left out.

    Raises ValueError naming a list that is missing.
    """
    damaged: list[Damage] = []
    events_of = {name: _events(root, name, damaged) for name in LISTS}
    by_test_first = [event for name in (PRIVATE_LIST, *PUBLIC_LISTS) for event in events_of[name]]
    classes = tuple(dict.fromkeys(event.category for event in by_test_first))
    folder = MediaFolder(root / VIDEO_FOLDER, ENDINGS) if (root / VIDEO_FOLDER).is_dir() else None
    videos = {} if folder is None else folder.files
    refs: list[ClipRef] = []
    named = _named(events_of)
    for name, event in named.items():
        path = videos.get(event.video_id)
        if path is not None:
            label = classes.index(event.category)
            refs.append(ClipRef(name, path, path, label, None, event.start_s, event.end_s))
        else:
            link = None if folder is None else folder.dangling.get(event.video_id)
            absent = (
                f"{VIDEO_FOLDER}/{event.video_id}.mp4 is missing" if link is None else f"{link.name}, {link.reason}"
            )
            damaged.append(Damage(name, f"no sound and no picture: {absent}"))
    left_out: list[Damage] = []
    if folder is not None:
        listed = {event.video_id for event in named.values()}
        strangers = [path.name for video_id, path in videos.items() if video_id not in listed]
        unlisted = f"not read: it is in none of {', '.join(LISTS)}"
        left_out = folder.left_out + [Damage(f"{VIDEO_FOLDER}/{name}", unlisted) for name in strangers]
    sorted_refs = tuple(sorted(refs, key=lambda ref: ref.name))
    return Listing(LAYOUT, classes, sorted_refs, tuple(damaged), left_out=tuple(left_out))


def read_lists(root: Path) -> dict[str, tuple[str, ...]]:
    """Return the clip names of each published list, by its file name. Raises ValueError naming a missing list."""
    events_of = {name: _events(root, name, []) for name in LISTS}
    names = {event: name for name, event in _named(events_of).items()}
    return {
        name: tuple(sorted({names[event] for event in events if event in names})) for name, events in events_of.items()
    }


def _named(events_of: dict[str, list[Event]]) -> dict[str, Event]:
    """Return each distinct event under a unique name that does not depend on the order of the lists."""
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
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip() or line.startswith("Category&"):
            continue
        try:
            events.append(parse_line(line))
        except ValueError as error:
            damaged.append(Damage(f"{name}:{number}", str(error)))
    return events
