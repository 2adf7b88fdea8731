"""README.md and the pages of docs/ are short in line, paragraph and whole, and no link of theirs is broken."""

import re
from pathlib import Path

import pytest

from tests.rigs.project.pages import ROOT, broken_links, history, pages, paragraphs, prose

LONGEST_LINE = 120
MOST_SENTENCES = 5
MOST_LINES_OF_README = 120
LIVING = [page for page in pages() if not history(page)]


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", LIVING, ids=_name)
def test_no_line_of_prose_is_long(page: Path) -> None:
    """Rows of tables cannot be broken in Markdown, so they are left out. Blocks of code are checked as well."""
    lines = page.read_text(encoding="utf-8").splitlines()
    long = [number for number, line in enumerate(lines, 1) if len(line) > LONGEST_LINE and not line.startswith("|")]
    assert not long


@pytest.mark.parametrize("page", LIVING, ids=_name)
def test_a_paragraph_has_at_most_five_sentences(page: Path) -> None:
    long = [number for number, text in paragraphs(page) if len(re.findall(r"[.!?](?=[\s)*]|$)", text)) > MOST_SENTENCES]
    assert not long


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < MOST_LINES_OF_README


@pytest.mark.parametrize("page", pages(), ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One heading\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md#one-heading) [b](other.md#two) ![c](no.svg)\n\n[d]: gone.md\n\n```\n[e](f.md)\n```\n")
    assert broken_links(page) == ["1: other.md#two", "1: no.svg", "3: gone.md"]


@pytest.mark.parametrize("page", LIVING, ids=_name)
def test_modules_that_prose_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:edge|cloud|data|distill|proto|isthmus)/[\w/]+\.py)`", page.read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_readme_has_no_undefined_reference() -> None:
    text = "\n".join(line for _, line in prose(ROOT / "README.md"))
    used = set(re.findall(r"\[([\w -]+)\](?![(:\[])", text))
    defined = set(re.findall(r"^\[([^\]]+)\]:", text, flags=re.MULTILINE))
    assert used == defined


def test_a_decision_has_a_number_of_its_own_and_says_it_first() -> None:
    records = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    numbers = [record.name[:4] for record in records]
    assert records and len(set(numbers)) == len(numbers)
    assert [record.read_text().split(":")[0] for record in records] == [f"# {number}" for number in numbers]
