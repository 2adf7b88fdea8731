"""Turn what a device wrote (its report, and its disclosure before the upload) into one client's part of the outcome."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from isthmus.demo.outcome import AnsweredClips, Answering, ClientOutcome, Correction
from isthmus.proto.messages import ratio_name


def client_outcome(
    name: str,
    report: Mapping[str, Any],
    taught: Mapping[str, Any] | None,
    corrections: Sequence[Correction],
    disclosure: Mapping[str, Any],
    ratios: Sequence[float],
) -> ClientOutcome:
    """Return the outcome of one client.

    ``report``: what ``isthmus edge run --report`` wrote before the ``corrections``; ``taught``: the same after them,
    or None if there were none. ``disclosure``: what ``isthmus edge prototypes --json`` wrote.

    A clip without an answer counts as wrong. Raises KeyError if a report lacks a part or a clip.
    """
    # A 0.1 device knows no person model: its answers are those that it gives to an unknown user.
    clips = [
        {"before_without_labels": clip["before"], "without_labels": clip["local"], **clip}
        for clip in report["predictions"]
        if clip["label"] is not None
    ]
    after = {} if taught is None else {clip["name"]: clip for clip in taught["predictions"]}
    sent = report["bytes"]["up_per_clip"]
    names = [ratio_name(ratio) for ratio in ratios]
    known = "user known" if report.get("person") is not None else "with habits"
    finished = "base student (own refused)" if report["students"]["refused"] else "own student"
    told = f"{len(corrections)} corrections" if corrections else "which cannot be corrected"
    tested = AnsweredClips(
        names=tuple(clip["name"] for clip in clips),
        labels=tuple(clip["label"] for clip in clips),
        predicted={
            "before": tuple(clip["before"] for clip in clips),
            "without_labels": tuple(clip["without_labels"] for clip in clips),
            "with_corrections": tuple(
                clip["without_labels"] if taught is None else after[clip["name"]]["local"] for clip in clips
            ),
        },
    )

    def row(way: str, right: int, ms: Iterable[float | None], bytes_up: float = 0.0) -> Answering:
        return Answering(way, right, len(clips), _median(ms), bytes_up)

    alone_ms = [clip["ms"]["local"] for clip in clips]
    answering = [
        row("base student", _right(clips, "before"), alone_ms),
        row(f"base student, {known}", _right(clips, "before_without_labels"), alone_ms),
        row(finished, _right(clips, "plain"), alone_ms),
        row(f"{finished}, {known}", _right(clips, "without_labels"), alone_ms),
        *(
            row(
                f"{finished}, {known}, by the cloud, ratio {ratio}",
                sum(clip["cloud"].get(ratio) == clip["label"] for clip in clips),
                [clip["ms"]["cloud"].get(ratio) for clip in clips],
                sent[ratio],
            )
            for ratio in names
        ),
        row(f"{finished}, {known}, {told}", sum(tested.right("with_corrections")), alone_ms),
    ]
    job, rounds = report["job"], report["prototypes"]["rounds"]
    classes = report["classes"]
    return ClientOutcome(
        name=name,
        own_classes=tuple(classes[label] for label in sorted({clip["label"] for clip in clips})),
        selection_clips=len(report["clips"]["selection"]),
        test_clips=len(clips),
        answering=tuple(answering),
        tested=tested,
        corrections=tuple(corrections),
        learned=tuple(((taught or report).get("person") or {}).get("sentences", ())),
        encode_median_ms=_median(
            None if clip["ms"]["encode"] is None else clip["ms"]["decode"] + clip["ms"]["encode"] for clip in clips
        )
        or 0.0,
        raw_bytes_per_clip=report["bytes"]["raw_test_clips"] / max(1, len(report["clips"]["test"])),
        bytes_up={
            "prototypes, all rounds": report["bytes"]["up"]["prototypes"],
            **{f"features, ratio {ratio}": report["bytes"]["up"]["inference"][ratio] for ratio in names},
            "all the rest": report["bytes"]["up"]["control"],
        },
        bytes_down={kind.replace("_", " "): count for kind, count in report["bytes"]["down"].items() if count},
        prototypes_KC=np.asarray(disclosure["values"], np.float32),
        sizes_K=np.asarray([row["clips"] for row in disclosure["rows"]], np.int32),
        prototype_bytes=disclosure["message_bytes"],
        min_cluster=min(entry["min_size"] for entry in rounds),
        epsilon=report["prototypes"]["epsilon_spent"] or None,
        rounds=len(rounds),
        selected_per_class=tuple(job["selected_per_class"]),
        cloud_seconds=job["stage_seconds"],
        rss_bytes=report["rss_peak_bytes"],
        verdict=_verdict(report["guard"]),
        student_bytes=sum(report["bytes"]["student_files"].values()),
        whole_student_bytes=sum(report["bytes"]["student_files_whole"].values()),
    )


def _right(clips: Sequence[Mapping[str, Any]], way: str) -> int:
    return sum(clip[way] == clip["label"] for clip in clips)


def _verdict(guard: Mapping[str, Any] | None) -> str:
    if guard is None:
        return "no new student came"
    right = {True: ", which the test clips confirm", False: ", which the test clips do not confirm", None: ""}
    return f"{'taken' if guard['accepted'] else 'refused'}{right[guard['right']]}: {guard['reason']}"


def _median(values_ms: Iterable[float | None]) -> float | None:
    known = [value for value in values_ms if value is not None]
    return statistics.median(known) if known else None
