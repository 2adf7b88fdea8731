"""Detect which published layout a folder has, and read its listing."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from isthmus.data.clip import Listing
from isthmus.data.layouts import ave, crema_d

AUTO: Final = "auto"
READERS: Final[dict[str, Callable[[Path], Listing]]] = {crema_d.LAYOUT: crema_d.read, ave.LAYOUT: ave.read}


def detect(root: Path) -> str:
    """Return the layout's name, from the folders and lists that only it has. Raises ValueError if neither fits."""
    if not root.is_dir():
        raise ValueError(f"{root} is no folder")
    if any((root / folder).is_dir() for folder in (crema_d.AUDIO_FOLDER, crema_d.VIDEO_FOLDER)):
        return crema_d.LAYOUT
    if (root / ave.VIDEO_FOLDER).is_dir() or any((root / name).is_file() for name in ave.LISTS):
        return ave.LAYOUT
    below = [path.name for path in sorted(root.iterdir()) if path.is_dir() and _fits(path)]
    hint = f". {root / below[0]} has: did you mean that?" if below else ""
    raise ValueError(
        f"{root} has neither the CREMA-D layout ({crema_d.AUDIO_FOLDER}/ and {crema_d.VIDEO_FOLDER}/) "
        f"nor the AVE layout ({ave.VIDEO_FOLDER}/ with {', '.join(ave.LISTS)}){hint}"
    )


def _fits(root: Path) -> bool:
    crema_d_folders, ave_folder = (crema_d.AUDIO_FOLDER, crema_d.VIDEO_FOLDER), ave.VIDEO_FOLDER
    return any((root / folder).is_dir() for folder in (*crema_d_folders, ave_folder))


def read_listing(root: Path, layout: str = AUTO) -> Listing:
    """Return the clips of a data set, by name; nothing is decoded.

    Raises ValueError for an unknown layout, for a folder that has none, and for a folder that lacks a part of its
    layout.

    >>> read_listing(data).refs[0].name
    '1001_DFA_ANG_XX'
    """
    if layout != AUTO and layout not in READERS:
        raise ValueError(f"no layout '{layout}': known are {AUTO}, {', '.join(READERS)}")
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder")
    return READERS[detect(root) if layout == AUTO else layout](root)
