"""The report of a run as JSON: predictions, accuracies, bytes and times. Labels appear only here."""

import json
import resource
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from isthmus.data.files import write_atomically
from isthmus.edge.agent.device_state import LedgerEntry
from isthmus.edge.agent.inference import Answer, accuracy
from isthmus.edge.own_clips.habits import Habits
from isthmus.edge.own_clips.own_clips import StoredVerdict
from isthmus.edge.own_clips.personal import PersonFacts
from isthmus.edge.student.disk import disk_errors
from isthmus.edge.student.download import Tally
from isthmus.edge.student.encoder import Encoded
from isthmus.proto.messages import Captured, JobStatus, ratio_name

FORMAT = 1


@dataclass
class ClipResult:
    """The answers to one test clip.

    ``before``: by the first student, on the device. ``before_without_labels``: the same, read for the user as
    unlabelled clips show them. ``plain``: by the finished student, on the device. ``without_labels``: the same, read
    for the user as unlabelled clips show them. ``local``: read with the user's corrections too, if there are any.
    ``cloud``: by the cloud from the finished student's features, by ratio, read as ``local``. ``refused``: by a refused
    student on the device, if the clip's label is known.
    """

    name: str
    label: int | None
    before: Answer | None = None
    before_without_labels: Answer | None = None
    without_labels: Answer | None = None
    local: Answer | None = None
    plain: Answer | None = None
    cloud: dict[float, Answer] = field(default_factory=dict)
    refused: Answer | None = None
    encoded: Encoded | None = None

    @property
    def captured(self) -> str:
        """The clip's modalities; "" if it could not be encoded."""
        return "" if self.encoded is None else self.encoded.features.captured.value


@dataclass(frozen=True)
class RunFacts:
    """A run without its clips' results. Bytes are message bytes; ``raw_test_bytes``: the test clips' files."""

    device_name: str
    device_id: str
    cloud: str
    seed: int
    number_type: str
    ratios: tuple[float, ...]
    classes: tuple[str, ...]
    base_id: str
    interim_ids: tuple[str, ...]
    final_id: str
    selection_names: tuple[str, ...]
    damaged: dict[str, str]
    uploads: tuple[LedgerEntry, ...]
    up_bytes: dict[str, int]
    down_bytes: dict[str, int]
    downloads: dict[str, Tally]
    raw_selection_bytes: int
    raw_test_bytes: int
    job: JobStatus | None
    stage_s: dict[str, float]
    wall_s: float
    failure: str
    verdict: str
    refused_id: str
    compared: StoredVerdict | None
    habits: Habits | None
    person: PersonFacts | None
    link: dict[str, float | str | None]


def build_report(facts: RunFacts, clips: Sequence[ClipResult]) -> dict[str, Any]:
    """Return the report as plain JSON values. A class is an index into ``classes``; null means "unknown"."""
    labels = [clip.label for clip in clips]
    cloud_of = {ratio_name(ratio): [clip.cloud.get(ratio) for clip in clips] for ratio in facts.ratios}
    inference_bytes = {name: sum(a.up_bytes for a in answers if a) for name, answers in cloud_of.items()}
    latest = facts.uploads[-1] if facts.uploads else None
    job = facts.job
    corrected = facts.person is not None and facts.person.corrections > 0
    return {
        "format": FORMAT,
        "device": {"name": facts.device_name, "id": facts.device_id, "cloud": facts.cloud},
        "settings": {"seed": facts.seed, "number_type": facts.number_type, "ratios": list(facts.ratios)},
        "classes": list(facts.classes),
        "students": {
            "base": facts.base_id,
            "interim": list(facts.interim_ids),
            "final": facts.final_id,
            "refused": facts.refused_id,
        },
        "failure": facts.failure,
        "guard": _guard(facts, clips),
        "habits": None if facts.habits is None else asdict(facts.habits),
        "person": None if facts.person is None else asdict(facts.person),
        "clips": {
            "selection": list(facts.selection_names),
            "test": [clip.name for clip in clips],
            "skipped": facts.damaged,
            "captured": {each.value: sum(clip.captured == each.value for clip in clips) for each in Captured},
        },
        "prototypes": {
            "count": latest.rows if latest else 0,
            "min_size": latest.smallest if latest else 0,
            "epsilon_spent": sum(entry.epsilon or 0.0 for entry in facts.uploads),
            "rounds": [
                {
                    "round": entry.round,
                    "mode": entry.mode,
                    "count": entry.rows,
                    "min_size": entry.smallest,
                    "sizes": list(entry.sizes),
                    "bytes": entry.message_bytes,
                    "epsilon": entry.epsilon,
                }
                for entry in facts.uploads
            ],
        },
        "accuracy": {
            "before": accuracy([_predicted(clip.before) for clip in clips], labels),
            "before_without_labels": accuracy([_predicted(clip.before_without_labels) for clip in clips], labels),
            "local": accuracy([_predicted(clip.local) for clip in clips], labels),
            "without_labels": accuracy([_predicted(clip.without_labels) for clip in clips], labels),
            "with_corrections": accuracy([_predicted(clip.local) for clip in clips], labels) if corrected else None,
            "without_habits": accuracy([_predicted(clip.plain) for clip in clips], labels),
            "cloud": {
                name: accuracy([_predicted(answer) for answer in answers], labels) for name, answers in cloud_of.items()
            },
            "clips_with_label": sum(label is not None for label in labels),
            "captured": {each.value: _accuracy_of(each, clips, facts.ratios) for each in Captured},
        },
        "bytes": {
            "up": {
                "prototypes": facts.up_bytes.get("prototypes", 0),
                "control": facts.up_bytes.get("control", 0) + facts.up_bytes.get("student", 0),
                "inference": inference_bytes,
                "inference_all": facts.up_bytes.get("inference", 0),
            },
            "down": facts.down_bytes,
            "student_files": {stage: tally.came_bytes for stage, tally in facts.downloads.items()},
            "student_files_whole": {stage: tally.whole_bytes for stage, tally in facts.downloads.items()},
            "up_per_clip": {
                name: total / max(1, sum(a is not None and a.up_bytes > 0 for a in cloud_of[name]))
                for name, total in inference_bytes.items()
            },
            "raw_test_clips": facts.raw_test_bytes,
            "raw_selection_clips": facts.raw_selection_bytes,
        },
        "ms_per_clip": _stage_ms(clips, cloud_of),
        "wall_s": {"total": facts.wall_s, "stages": facts.stage_s},
        "job": None
        if job is None
        else {
            "id": job.job_id,
            "stage": job.stage.value,
            "rounds": job.rounds,
            "rounds_done": job.round + 1,
            "settled": job.settled,
            "selected_per_class": list(job.selected_per_class),
            "stage_seconds": job.stage_seconds,
            "error": job.error,
        },
        "link": facts.link,
        "rss_bytes": rss_bytes(),
        "rss_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "predictions": [_prediction(clip, corrected=corrected) for clip in clips],
    }


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write the report atomically. Raises StorageFull."""
    with disk_errors():
        write_atomically(path, json.dumps(report, indent=1) + "\n")


def rss_bytes() -> int:
    """Return this process's resident bytes; its peak if the system does not report the present value."""
    try:
        resident_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return resident_pages * resource.getpagesize()


def _guard(facts: RunFacts, clips: Sequence[ClipResult]) -> dict[str, Any] | None:
    """Return why the new student was accepted or refused; ``right`` is known if test clips have labels."""
    if not facts.verdict:
        return None
    compared, accepted = facts.compared, not facts.refused_id
    labels = [clip.label for clip in clips]
    old = accuracy([_predicted(clip.before) for clip in clips], labels)
    new = accuracy([_predicted(clip.plain if accepted else clip.refused) for clip in clips], labels)
    return {
        "accepted": accepted,
        "reason": facts.verdict,
        "estimator": compared.estimator if compared else None,
        "margin": compared.margin if compared else None,
        "clips": compared.clips if compared else 0,
        "changed": compared.changed if compared else 0,
        "estimates": {"old": compared.old, "new": compared.new} if compared else None,
        "true_accuracy": {"old": old, "new": new},
        "right": accepted == (new >= old) if old is not None and new is not None and compared else None,
    }


def _predicted(answer: Answer | None) -> int | None:
    return None if answer is None else answer.predicted


def _accuracy_of(captured: Captured, clips: Sequence[ClipResult], ratios: Sequence[float]) -> dict[str, Any]:
    """Return the report's accuracies for the clips with exactly these modalities."""
    some = [clip for clip in clips if clip.captured == captured.value]
    labels = [clip.label for clip in some]
    return {
        "before": accuracy([_predicted(clip.before) for clip in some], labels),
        "local": accuracy([_predicted(clip.local) for clip in some], labels),
        "cloud": {
            ratio_name(ratio): accuracy([_predicted(clip.cloud.get(ratio)) for clip in some], labels)
            for ratio in ratios
        },
        "clips_with_label": sum(label is not None for label in labels),
    }


def _prediction(clip: ClipResult, *, corrected: bool) -> dict[str, Any]:
    encoded = clip.encoded
    return {
        "name": clip.name,
        "label": clip.label,
        "captured": clip.captured,
        "before": _predicted(clip.before),
        "before_without_labels": _predicted(clip.before_without_labels),
        "without_labels": _predicted(clip.without_labels),
        "with_corrections": _predicted(clip.local) if corrected else None,
        "local": _predicted(clip.local),
        "plain": _predicted(clip.plain),
        "refused": _predicted(clip.refused),
        "cloud": {ratio_name(ratio): answer.predicted for ratio, answer in clip.cloud.items()},
        "cloud_errors": {ratio_name(ratio): answer.error for ratio, answer in clip.cloud.items() if answer.error},
        "probabilities": {
            "before": _rounded(clip.before),
            "without_labels": _rounded(clip.without_labels),
            "local": _rounded(clip.local),
            "cloud": {ratio_name(ratio): _rounded(answer) for ratio, answer in clip.cloud.items()},
        },
        "ms": {
            "decode": None if encoded is None else encoded.decode_ms,
            "encode": None if encoded is None else encoded.encode_ms,
            "local": None if clip.local is None else clip.local.total_ms,
            "cloud": {ratio_name(ratio): answer.total_ms for ratio, answer in clip.cloud.items()},
        },
    }


def _rounded(answer: Answer | None) -> list[float] | None:
    if answer is None or answer.probabilities_C is None:
        return None
    return [round(float(value), 6) for value in answer.probabilities_C]


def _stage_ms(clips: Sequence[ClipResult], cloud_of: dict[str, list[Answer | None]]) -> dict[str, Any]:
    encoded = [clip.encoded for clip in clips if clip.encoded is not None]
    stages: dict[str, Any] = {
        "decode": _spread([each.decode_ms for each in encoded]),
        "encode": _spread([each.encode_ms for each in encoded]),
        "local_head": _spread([clip.local.total_ms for clip in clips if clip.local is not None]),
    }
    for stage in ("compress", "round_trip", "server"):
        stages[stage] = {
            name: _spread([getattr(answer, f"{stage}_ms") for answer in answers if _predicted(answer) is not None])
            for name, answers in cloud_of.items()
        }
    return stages


def _spread(values_ms: Sequence[float]) -> dict[str, float] | None:
    if not values_ms:
        return None
    ordered = sorted(values_ms)
    return {
        "mean": statistics.fmean(ordered),
        "median": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
    }
