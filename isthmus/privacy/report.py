"""The report: means over clients and seeds, sentences made from them, tables and one HTML page."""

import base64
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from isthmus import __version__
from isthmus.data.files import write_atomically
from isthmus.privacy import pictures
from isthmus.privacy.cells import BASELINES

SURE = 0.9
"""At or above this rate the report says that an attack succeeds nearly always."""
BETTER = 0.6
"""At or above this rate the report says "better than by guessing", below it "a little better". In both cases the mean
must be more than two standard errors above one half."""

Cell = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over cells (clients and seeds), and how many there were."""

    mean: float
    deviation: float
    count: int

    @property
    def low(self) -> float:
        """The mean minus two standard errors. Cells of one client share clips, so the true interval is wider."""
        return self.mean - 2 * self.deviation / math.sqrt(self.count) if self.count else math.nan

    def text(self, scale: float = 1.0, digits: int = 2) -> str:
        if not self.count:
            return "not measurable"
        return f"{scale * self.mean:.{digits}f} ± {scale * self.deviation:.{digits}f}"


@dataclass(frozen=True)
class ModeSummary:
    """One mode over all clients and seeds. None: does not apply to this mode."""

    name: str
    kind: str
    floor: int
    epsilon: float | None
    message_bytes: Spread
    rows: Spread
    inversion: dict[str, Spread] | None
    membership: dict[str, Spread]
    """Area under the curve by '<score>, <against>'."""
    found: dict[str, Spread]
    """True positive rate, likewise."""
    selection: dict[str, Spread] | None

    @property
    def best_membership(self) -> Spread:
        """The attack with the best mean against the same person's other clips."""
        return max((value for key, value in self.membership.items() if "same person" in key), key=lambda s: s.mean)


def spread(values: list[float | None]) -> Spread:
    """Return mean and deviation of the values that are not None."""
    kept = [value for value in values if value is not None]
    if not kept:
        return Spread(math.nan, math.nan, 0)
    return Spread(statistics.mean(kept), statistics.stdev(kept) if len(kept) > 1 else 0.0, len(kept))


def summarise(result: dict[str, Any]) -> list[ModeSummary]:
    """Summarise each mode, from the least to the most private."""
    cells = [cell for cell in result["cells"] if cell["kind"] == "mode"]
    slugs = dict.fromkeys(cell["slug"] for cell in cells)
    return [_summary([cell for cell in cells if cell["slug"] == slug]) for slug in slugs]


def _summary(cells: list[Cell]) -> ModeSummary:
    first = cells[0]

    def over(part: str, value: Callable[[Any], float | None] = lambda each: each) -> dict[str, Spread] | None:
        if first[part] is None:
            return None
        keys = [key for key in first[part] if all(key in cell[part] for cell in cells)]
        return {key: spread([value(cell[part][key]) for cell in cells]) for key in keys}

    return ModeSummary(
        name=first["mode"],
        kind=first["upload"],
        floor=first["floor"],
        epsilon=first["epsilon"],
        message_bytes=spread([float(cell["message_bytes"]) for cell in cells]),
        rows=spread([float(cell["rows"]) for cell in cells]),
        inversion=over("inversion"),
        membership=over("membership", lambda row: float(row["auc"]["value"])) or {},
        found=over("membership", lambda row: float(row["true_positive_rate"]["value"])) or {},
        selection=over("selection"),
    )


def baselines(result: dict[str, Any]) -> dict[str, dict[str, Spread]]:
    """Summarise guesses that need no upload, and the best reconstruction that the decoder could draw."""
    cells = [cell for cell in result["cells"] if cell["kind"] == "baselines"]
    return {
        name: {key: spread([cell["inversion"][name][key] for cell in cells]) for key in cells[0]["inversion"][name]}
        for name in BASELINES
    }


def words(summary: ModeSummary, chance_retrieval: float) -> list[str]:
    """Return sentences: what the holder of this upload can and cannot learn, as far as these attacks show."""
    if summary.inversion is None or summary.selection is None:
        return [
            "The control: an upload made from another person's clips.",
            f"The better membership attack scores {summary.best_membership.text()} on it; 0.5 is guessing.",
            "A score above that is chance here, not knowledge.",
        ]
    said = []
    for what in ("sound", "picture"):
        rate, found = summary.inversion[f"{what}_same_class"], summary.inversion[f"{what}_retrieval"]
        verdict = _verdict(
            rate,
            f"The {what} reconstructed from the upload nearly always identifies the right clip of its class",
            f"The {what} reconstructed from the upload identifies the right clip of its class more often than chance",
            f"The {what} reconstructed from the upload reveals a little more of a clip than its class",
            f"The {what} reconstructed from the upload was not shown to reveal more of a clip than its class",
        )
        if not rate.count:
            verdict = (
                f"Whether the {what} reconstructed from the upload reveals more than the class cannot be measured here"
            )
        against = f"{rate.text(100, 1)} % against one other clip, chance 50; " if rate.count else ""
        said.append(
            f"{verdict} ({against}the exact clip out of all in {found.text(100, 1)} % of cases, "
            f"chance {100 * chance_retrieval:.1f})."
        )
    member = summary.best_membership
    whether = "whether it was among the clips behind the upload"
    verdict = _verdict(
        member,
        f"Someone who already has a clip of yours can nearly always tell {whether}",
        f"Someone who already has a clip of yours can tell better than by guessing {whether}",
        f"Someone who already has a clip of yours can tell a little better than by guessing {whether}",
        f"Someone who already has a clip of yours was not shown to be able to tell {whether}",
    )
    said.append(f"{verdict} (area under the curve {member.text()}, guessing 0.5).")
    strangers = [value for key, value in summary.membership.items() if key.endswith("others")]
    if strangers:
        area = max(strangers, key=lambda each: each.mean)
        verdict = _verdict(
            area,
            "Your clips are nearly always distinguished from those of other people",
            "Your clips are distinguished from those of other people better than by guessing",
            "Your clips are distinguished from those of other people a little better than by guessing",
            "Your clips were not shown to be distinguishable from those of other people",
        )
        said.append(f"{verdict} ({area.text()}).")
    error, uniform = summary.selection["prior_error"], summary.selection["prior_error_uniform"]
    knows = (
        "It reveals how often each class occurs in your clips"
        if error.mean < 0.75 * uniform.mean
        else "It hardly reveals how often each class occurs in your clips: assuming equal shares does about as well"
    )
    said.append(
        f"{knows}: the sum of the absolute errors of the shares is {error.text()} "
        f"(0 is exact, {uniform.mean:.2f} is the error of equal shares)."
    )
    said.append(_guarantee(summary))
    return said


def _verdict(rate: Spread, sure: str, better: str, little: str, neither: str) -> str:
    if not rate.low > 0.5:
        return neither
    return sure if rate.mean >= SURE else better if rate.mean >= BETTER else little


def _guarantee(summary: ModeSummary) -> str:
    if summary.kind in ("features", "probabilities"):
        return "There is no floor and no noise: every clip has its own row."
    if summary.epsilon is None:
        return (
            f"Each row is the mean of at least {summary.floor} clips. That is no formal guarantee: averaging similar "
            "clips hides little, and stronger attacks may find more."
        )
    return (
        f"The noise has a formal guarantee of epsilon {summary.epsilon:g} per upload, and each later round adds as "
        "much again. It covers the averages only: which clips are averaged together, and how many, is not hidden."
        + (" An epsilon above 5 promises little." if summary.epsilon > 5 else "")
    )


def markdown(result: dict[str, Any]) -> str:
    """Return the tables as Markdown: mean ± standard deviation over clients and seeds."""
    summaries, base = summarise(result), baselines(result)
    chance = _chance_retrieval(result)
    clips = sorted({cell["clips"] for cell in result["cells"]})
    lines = [
        (
            f"Clients {', '.join(result['clients'])}; seeds {', '.join(map(str, result['seeds']))}; "
            f"{' or '.join(map(str, clips))} clips behind an upload. Mean ± standard deviation over clients and seeds."
        ),
        "",
        "### Inversion: a decoder trained on public clips",
        "",
        (
            "| upload | sound SSIM | picture SSIM | sound MSE | picture MSE | sound: identified in its class % | "
            "picture: identified in its class % | sound: exact clip % | picture: exact clip % |"
        ),
        "| --- |" + " --- |" * 8,
    ]
    rows = [(summary.name, summary.inversion) for summary in summaries if summary.inversion is not None]
    for name, row in [*((f"({key})", value) for key, value in base.items()), *rows]:
        lines.append(
            f"| {name} | {row['sound_ssim'].text()} | {row['picture_ssim'].text()} | {row['sound_mse'].text(1, 3)} | "
            f"{row['picture_mse'].text(1, 3)} | {row['sound_same_class'].text(100, 1)} | "
            f"{row['picture_same_class'].text(100, 1)} | {row['sound_retrieval'].text(100, 1)} | "
            f"{row['picture_retrieval'].text(100, 1)} |"
        )
    lines.append(f"| (chance) | | | | | 50 | 50 | {100 * chance:.1f} | {100 * chance:.1f} |")
    lines += ["", "### Membership: area under the curve", ""]
    kinds = list(dict.fromkeys(key for summary in summaries for key in summary.membership))
    lines += [f"| upload | {' | '.join(kinds)} |", f"| --- |{' --- |' * len(kinds)}"]
    for summary in summaries:
        cells = [summary.membership[kind].text() if kind in summary.membership else "" for kind in kinds]
        lines.append(f"| {summary.name} | {' | '.join(cells)} |")
    lines += [f"| (chance) |{' 0.50 |' * len(kinds)}", "", "### Membership: members found, %", ""]
    rates = _false_positive_rates(result, kinds)
    heads = " | ".join(f"{kind}, at {100 * rate:g} % false" for kind, rate in zip(kinds, rates, strict=True))
    lines += [f"| upload | {heads} |", f"| --- |{' --- |' * len(kinds)}"]
    for summary in summaries:
        cells = [summary.found[kind].text(100, 1) if kind in summary.found else "" for kind in kinds]
        lines.append(f"| {summary.name} | {' | '.join(cells)} |")
    lines.append(f"| (chance) | {' | '.join(f'{100 * rate:g}' for rate in rates)} |")
    lines += [
        "",
        "### What the cloud can still do with it",
        "",
        (
            "| upload | bytes | rows | error of class shares | overlap with the exact selection % | by chance % | "
            "error of selected classes |"
        ),
        "| --- |" + " --- |" * 6,
    ]
    for summary in summaries:
        if summary.selection is not None:
            row = summary.selection
            lines.append(
                f"| {summary.name} | {summary.message_bytes.mean:,.0f} | {summary.rows.mean:.1f} | "
                f"{row['prior_error'].text()} | {row['overlap'].text(100, 1)} | "
                f"{100 * row['overlap_chance'].mean:.1f} | {row['selected_class_error'].text()} |"
            )
    uniform = next(summary.selection for summary in summaries if summary.selection is not None)["prior_error_uniform"]
    lines += ["", f"Assuming equal class shares has an error of {uniform.text()}.", "", "### In plain words", ""]
    for summary in summaries:
        lines += [f"**{summary.name}**", "", *[f"- {said}" for said in words(summary, chance)], ""]
    if result["skipped"]:
        lines += [f"Skipped: {len(result['skipped'])} cells.", "", *[f"- {why}" for why in result["skipped"]], ""]
    return "\n".join(lines)


def render(result: dict[str, Any], out: Path) -> str:
    """Return the page as text with inline PNG pictures, and write the pictures below ``out/pictures`` too."""
    summaries = summarise(result)
    drawn = pictures.draw(result, summaries, out)
    for name, png in drawn.items():
        write_atomically(out / "pictures" / f"{name}.png", png)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("isthmus.privacy", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(inline=lambda png: "data:image/png;base64," + base64.b64encode(png).decode())
    chance = _chance_retrieval(result)
    slugs = {cell["mode"]: cell["slug"] for cell in result["cells"] if cell["kind"] == "mode"}
    return environment.get_template("report.html").render(
        version=__version__,
        result=result,
        summaries=summaries,
        baselines=baselines(result),
        chance=chance,
        words={summary.name: words(summary, chance) for summary in summaries},
        drawn=drawn,
        slugs=slugs,
        sure=SURE,
        better=BETTER,
    )


def _chance_retrieval(result: dict[str, Any]) -> float:
    return statistics.mean(
        float(cell["chance"]["retrieval"]) for cell in result["cells"] if cell["kind"] == "baselines"
    )


def _false_positive_rates(result: dict[str, Any], kinds: list[str]) -> list[float]:
    rates = []
    for kind in kinds:
        rows = [cell["membership"].get(kind) for cell in result["cells"] if cell["kind"] == "mode"]
        rates.append(max(row["at_false_positive_rate"] for row in rows if row is not None))
    return rates
