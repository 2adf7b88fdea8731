"""The media files of a folder by clip name, and every other entry with the reason why it is not read."""

from pathlib import Path
from typing import Final

from isthmus.data.clip import Damage

SOUND: Final = (
    *(".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".oga", ".opus", ".aif", ".aiff"),
    *(".w64", ".rf64", ".caf", ".au", ".wma", ".mka"),
)
"""Endings of sound files, the layout's own first."""
FILM: Final = (
    *(".flv", ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"),
    *(".mpg", ".mpeg", ".ts", ".mts", ".3gp", ".wmv", ".ogv"),
)
"""Endings of films, with or without sound."""

_LEFT_BY_SYSTEMS: Final = frozenset({"thumbs.db", "desktop.ini"})


class MediaFolder:
    """The files of a folder, by clip name.

    ``files``: one path for each clip name. ``dangling``: links whose target is not here, by clip name. ``left_out``:
    every other entry, with the reason. Hidden files, and those that operating systems leave, are not mentioned.
    """

    def __init__(self, folder: Path, endings: tuple[str, ...]):
        self.files: dict[str, Path] = {}
        self.dangling: dict[str, Damage] = {}
        self.left_out: list[Damage] = []
        of_stem: dict[str, list[Path]] = {}
        for path in sorted(folder.iterdir()):
            shown = f"{folder.name}/{path.name}"
            if path.name.startswith(".") or path.name.lower() in _LEFT_BY_SYSTEMS:
                continue
            if path.is_symlink() and not path.exists():
                reason = f"a link to {path.readlink()}, which is not here: fetch it (git annex get, dvc pull)"
                self.dangling[path.stem] = Damage(shown, reason)
            elif path.is_dir():
                self.left_out.append(Damage(shown, "a folder: only files directly in the layout's folders are read"))
            elif path.suffix.lower() == ".dvc":
                self.left_out.append(Damage(shown, "a DVC pointer, not the file itself: run 'dvc pull'"))
            elif not path.is_file() or path.suffix.lower() not in endings:
                self.left_out.append(Damage(shown, f"not read: its ending is none of {' '.join(endings)}"))
            else:
                of_stem.setdefault(path.stem, []).append(path)
        for stem, paths in of_stem.items():
            used, *others = sorted(paths, key=lambda path: (endings.index(path.suffix.lower()), path.suffix.isupper()))
            self.files[stem] = used
            self.left_out += [
                Damage(f"{folder.name}/{other.name}", f"not read: {used.name} is read instead") for other in others
            ]
