"""Turn what a device wrote (its report, and its disclosure before the upload) into one client's part of the outcome."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isthmus.demo.outcome import Answering, ClientOutcome
from isthmus.proto.messages import ratio_name


def client_outcome(
    name: str, report: Mapping[str, Any], disclosure: Mapping[str, Any], ratios: Sequence[float]
) -> ClientOutcome:
    """Return the outcome of one client.

    ``report``: what ``isthmus edge run --report`` wrote. ``disclosure``: what ``isthmus edge prototypes --json`` wrote.

    A clip without an answer counts as wrong. Raises KeyError if the report lacks a part.
    """
    clips = [clip for clip in report["predictions"] if clip["label"] is not None]
    sent = report["bytes"]["up_per_clip"]
    names = [ratio_name(ratio) for ratio in ratios]
    refused = report["students"]["refused"]
    finished = "base student again (its own was refused)" if refused else "own student"
    answering = [
        Answering("base student, on the device", _right(clips, "before"), len(clips), None, 0.0),
        *(
            Answering(
                f"cloud, ratio {ratio}",
                sum(clip["cloud"].get(ratio) == clip["label"] for clip in clips),
                len(clips),
                _median(clip["ms"]["cloud"].get(ratio) for clip in clips),
                sent[ratio],
            )
            for ratio in names
        ),
        Answering(
            f"{finished}, without habits",
            _right(clips, "plain"),
            len(clips),
            _median(clip["ms"]["local"] for clip in clips),
            0.0,
        ),
        Answering(
            f"{finished}, on the device",
            _right(clips, "local"),
            len(clips),
            _median(clip["ms"]["local"] for clip in clips),
            0.0,
        ),
    ]
    job, rounds = report["job"], report["prototypes"]["rounds"]
    classes = report["classes"]
    return ClientOutcome(
        name=name,
        own_classes=tuple(classes[label] for label in sorted({clip["label"] for clip in clips})),
        selection_clips=len(report["clips"]["selection"]),
        test_clips=len(clips),
        answering=tuple(answering),
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


def _median(values_ms: Any) -> float | None:
    known = [value for value in values_ms if value is not None]
    return statistics.median(known) if known else None
