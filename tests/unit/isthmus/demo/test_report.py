"""The demo's table and page: self-contained, every figure of the outcome shown, foreign names escaped."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from isthmus.demo.outcome import (
    AnsweredClips,
    Answering,
    ClientOutcome,
    Correction,
    DemoOutcome,
    KeptClip,
    readable_bytes,
    readable_seconds,
)
from isthmus.demo.report import render_report, write_report
from isthmus.demo.result import closing_sentence, result_of
from isthmus.demo.stages import StageRecord
from isthmus.demo.table import closing_table

CLASSES = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")


def _client(name: str, own_classes: tuple[str, ...], prototypes: int) -> ClientOutcome:
    rng = np.random.default_rng(7)
    return ClientOutcome(
        name=name,
        own_classes=own_classes,
        selection_clips=30,
        test_clips=40,
        answering=(
            Answering("base student alone", 17, 40, None, 0.0),
            Answering("cloud, ratio 1", 31, 40, 3.2, 2079.0),
            Answering("cloud, ratio 2", 29, 40, 3.1, 1055.0),
            Answering("personal student alone", 30, 40, 0.5, 0.0),
        ),
        tested=AnsweredClips(
            names=tuple(f"clip_{number}" for number in range(40)),
            labels=(0, 1) * 20,
            predicted={
                "before": (0, 1) * 8 + (0,) + (None,) * 23,
                "without_labels": (0, 1) * 13 + (1, 0) * 7,
                "with_corrections": (0, 1) * 15 + (1, 0) * 5,
            },
        ),
        corrections=(Correction("clip_<7>", "HAP", "SAD"),),
        learned=("Your voice and face were learned from 30 of your clips, without labels.",),
        encode_median_ms=21.0,
        raw_bytes_per_clip=131_234.0,
        bytes_up={"prototypes": 700, "features": 83_160},
        bytes_down={"students": 91_234_567, "answers": 4_321},
        prototypes_KC=rng.dirichlet(np.ones(6), size=prototypes).astype(np.float32),
        sizes_K=np.full(prototypes, 3, np.int32),
        prototype_bytes=28 * prototypes,
        min_cluster=3,
        epsilon=None,
        selected_per_class=(20, 18, 22, 3, 1, 0),
        rounds=2,
        cloud_seconds={"selecting": 0.1, "distilling": 12.0},
        rss_bytes=210_000_000,
        verdict="taken, which the test clips confirm: estimated accuracy 41.0 % before and 70.0 % after",
        student_bytes=91_000_000,
        whole_student_bytes=280_000_000,
    )


def _kept(name: str) -> KeptClip:
    rng = np.random.default_rng(8)
    tone_T = np.sin(np.arange(16_000) / 5).astype(np.float32)
    return KeptClip(name, tone_T, 16_000, rng.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def outcome() -> DemoOutcome:
    return DemoOutcome(
        data_name="a synthetic set of 720 clips",
        synthetic=True,
        preset="smoke",
        seed=0,
        classes=CLASSES,
        public_clips=576,
        skipped_clips=0,
        clients=(_client("client_1", CLASSES[:3], 10), _client("client_2", CLASSES[3:], 9)),
        kept=(_kept("1013_a<b>"), _kept("1014_second")),
        teacher_accuracy={name: {"teacher": 0.81, "sound alone": 0.7} for name in ("client_1", "client_2")},
        losses={"teacher, audio": (1.7, 1.1), "teacher, visual": (1.8, 1.2), "base student": (0.8, 0.6)},
        stages=(StageRecord("data", "k", 12.0, reused=True), StageRecord("teacher", "k", 90.0)),
        total_seconds=187.0,
        edge_python=Path("python"),
        edge_has_torch=False,
        machine="2 cores",
    )


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.targets += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.fixture(scope="module")
def page(outcome: DemoOutcome, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the page of ``outcome``. Drawing its eleven pictures takes over a second."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(outcome, path, closing_sentence(result_of(outcome)))
    return path.read_text(encoding="utf-8")


def test_the_page_needs_no_other_file(page: str) -> None:
    links = _Links()
    links.feed(page)
    assert len(links.targets) == 11
    assert all(target.startswith("data:image/png;base64,") for target in links.targets)
    assert not {"script", "link", "iframe"} & set(links.tags)


def test_the_page_tells_what_happened(page: str) -> None:
    text = re.sub(r"\s+", " ", page)
    for said in (
        "17 → 26 → 30",
        "40 clips Isthmus understood 17 at first, 26 after it had learned from other clips",
        "<td>clip_&lt;7&gt;</td><td>HAP</td><td>SAD</td>",
        "Your voice and face were learned from 30 of your clips",
        "131 kB → 2.1 kB",
        "the mean of a group of at least 3 clips",
        "no noise was added",
        "30 clips became 10 rows of 6 probabilities",
        "These clips are synthetic",
        "an environment without torch",
        "the first of 2 rounds",
        "not timed",
        "client_1: the new student was taken, which the test clips confirm",
        "91.0 MB in place of 280 MB (client_1)",
        "3 min 07 s in all",
    ):
        assert said in text, said


def test_noise_is_reported_with_its_budget_and_names_of_the_data_set_are_escaped(
    outcome: DemoOutcome, page: str
) -> None:
    noisy = tuple(dataclasses.replace(client, epsilon=2.5) for client in outcome.clients)
    other = render_report(dataclasses.replace(outcome, clients=noisy, data_name="<script>alert(1)</script>"), "")
    assert "spent a privacy budget of 2.5" in other and "spent a privacy budget" not in page
    assert "1013_a&lt;b&gt;" in page
    assert "<script>" not in other and "&lt;script&gt;" in other


def test_a_client_that_cannot_be_corrected_has_no_state_after_corrections(outcome: DemoOutcome) -> None:
    clients = tuple(
        dataclasses.replace(
            client,
            corrections=(),
            learned=(),
            tested=dataclasses.replace(
                client.tested,
                predicted=client.tested.predicted | {"with_corrections": client.tested.predicted["without_labels"]},
            ),
        )
        for client in outcome.clients
    )
    text = render_report(dataclasses.replace(outcome, clients=clients), "")
    assert "<b>17 → 26</b><span>client_1: right of 40 clips, at first and without labels</span>" in text
    assert "none made" in text and "0 corrections" not in text
    assert "the release has no person model; the classes&#39; shares were estimated instead" in text


def test_the_table_has_a_row_for_every_way_of_answering(outcome: DemoOutcome) -> None:
    console = Console(width=160, force_terminal=False)
    with console.capture() as captured:
        console.print(closing_table(outcome))
    shown = captured.get()
    assert shown.count("cloud, ratio 2") == 2
    assert "77.5 %" in shown
    assert "client_1 10 (280 B), client_2 9 (252 B)" in " ".join(shown.split())


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (91_234_567, "91.2 MB")])
def test_bytes_are_shown_in_powers_of_a_thousand(count: int, text: str) -> None:
    assert readable_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.5, "9.5 s"), (59.6, "1 min 00 s"), (75, "1 min 15 s")]
)
def test_many_seconds_are_shown_in_minutes(seconds: float, text: str) -> None:
    assert readable_seconds(seconds) == text
