"""Read a device's report: what it sent, how well it answered, and what that cost.

    isthmus edge run --cloud HOST:PORT --state DIR --data DIR --report report.json
    python examples/read_report.py report.json [report.json ...]

``isthmus demo`` leaves one report per client in demo-out/run. The file is plain JSON: classes are indices into
``classes``, accuracies are shares of the clips with a label, ``null`` means unknown, sizes are bytes.
"""

import argparse
import json
from pathlib import Path
from typing import Any


def percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.1f} %"


def summary(report: dict[str, Any]) -> list[str]:
    """Six lines about one device."""
    accuracy, sizes, prototypes = report["accuracy"], report["bytes"], report["prototypes"]
    tested, skipped = len(report["clips"]["test"]), len(report["clips"]["skipped"])
    sent_bytes, raw_bytes = sizes["up"]["prototypes"], sizes["raw_selection_clips"]
    before, own = percent(accuracy["before"]), percent(accuracy["local"])
    lines = [
        f"device {report['device']['name']}: {tested} test clips, {skipped} skipped",
        f"  sent to personalise: {prototypes['count']} prototypes of at least {prototypes['min_size']} clips each",
        f"  that is {sent_bytes:,} bytes, instead of {raw_bytes:,} bytes of recordings",
        f"  accuracy: {before} with the base student, {own} with its own student",
    ]
    for ratio, share in accuracy["cloud"].items():
        per_clip = sizes["up_per_clip"].get(ratio, 0)
        lines.append(f"  through the cloud at ratio {ratio}: {percent(share)}, {per_clip:,.0f} bytes per clip")
    if report["failure"]:
        lines.append(f"  the last job failed: {report['failure']}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path, help="files written by 'isthmus edge run --report'")
    for path in parser.parse_args().reports:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            print("\n".join(summary(report)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.exit(1, f"{path} is not a device's report: {error}\n")


if __name__ == "__main__":
    main()
