"""Reads README.md and the pages of docs/: paragraphs, links, anchors and fenced blocks."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[3]
FENCE: Final = re.compile(r"^( *)(```+|~~~+)\s*(.*)$")
COMMENT: Final = re.compile(r"<!-- (.*) -->$")
ITEM: Final = re.compile(r"^([-*]|\d+\.) ")


def pages(root: Path = ROOT) -> list[Path]:
    """Return README.md and all Markdown files under docs/, sorted."""
    return [root / "README.md", *sorted(path for path in (root / "docs").rglob("*.md") if "_build" not in path.parts)]


def history(page: Path) -> bool:
    """Return whether ``page`` is history. Results and the log are not rewritten."""
    return "results" in page.parts or page.name == "log.md"


@dataclass(frozen=True)
class Block:
    """A fenced block: the file, the line of its opening fence (from 1), the info string and the text."""

    page: Path
    line: int
    info: str
    text: str
    mark: str = ""
    """The comment on the line above, such as ``check: takes hours`` of ``<!-- check: takes hours -->``."""

    @property
    def language(self) -> str:
        """The first word of the info string, without MyST's braces: ``{code-block} python`` is ``python``."""
        words = self.info.replace("{code-block}", "").split()
        return words[0] if words else ""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page.name}:{self.line}"


def _lines(page: Path) -> Iterator[tuple[int, str, Block | None]]:
    """Yield each line with its number and the block that it closes. Lines of blocks and fences are empty strings."""
    fence, opened, info, mark, text = "", 0, "", "", list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        found = FENCE.match(line)
        if not fence and found:
            fence, opened, info, text = found[2], number, found[3].strip(), []
            yield number, "", None
        elif fence and found and found[2].startswith(fence) and not found[3]:
            fence = ""
            yield number, "", Block(page, opened, info, "\n".join(text) + "\n", mark)
            mark = ""
        elif fence:
            text.append(line)
            yield number, "", None
        else:
            comment = COMMENT.match(line)
            mark = comment[1] if comment else ""
            yield number, line, None


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of ``page``, in order."""
    return [block for _, _, block in _lines(page) if block is not None]


def prose(page: Path) -> list[tuple[int, str]]:
    """Return the lines of ``page`` outside fenced blocks with their numbers (from 1). Lines of blocks are empty."""
    return [(number, line) for number, line, _ in _lines(page)]


def paragraphs(page: Path) -> list[tuple[int, str]]:
    """Return paragraphs and items of lists with the number of their first line, without tables and headings."""
    found: list[tuple[int, str]] = []
    new = True
    for number, line in prose(page):
        bare = line.strip()
        if not bare or bare.startswith(("|", "#", "[", "<", ":::", "![")):
            new = True
        elif new or ITEM.match(bare):
            found.append((number, ITEM.sub("", bare)))
            new = False
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]} {bare}")
    return found


def links(page: Path) -> list[tuple[int, str]]:
    """Return the targets of inline links, pictures and reference definitions of ``page``, with line numbers."""
    inline = r"\]\(([^)\s]+)[^)]*\)"
    defined = r"^\[[^\]]+\]:\s*(\S+)"
    return [
        (number, target)
        for number, line in prose(page)
        for found in re.findall(f"{inline}|{defined}", line)
        for target in found
        if target
    ]


def anchors(page: Path) -> set[str]:
    """Return the anchors of headings of ``page``, as GitHub and MyST make them, and ``(name)=`` targets."""
    found = set()
    for _, line in prose(page):
        if heading := re.match(r"#+ (.*)$", line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1].strip().lower())
            found.add(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))
        if target := re.match(r"\(([\w-]+)\)=$", line):
            found.add(target[1])
    return found


def broken_links(page: Path) -> list[str]:
    """Return the relative links of ``page`` whose file or anchor does not exist, as ``LINE: TARGET``."""
    broken = []
    for number, target in links(page):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(f"{number}: {target}")
    return broken
