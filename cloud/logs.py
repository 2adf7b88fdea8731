"""Log lines on standard error: JSON objects, always with the same few keys, or text for a person.

A line that a call or a job writes names its trace and its tenant, so that the lines of one call are found together,
also those of a worker on another machine.
"""

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Final, Literal

from isthmus.cloud import tracing

TENANT: Final[ContextVar[str]] = ContextVar("tenant", default="")
"""The tenant for which the current task or thread works; "" if that is nobody's."""


class JsonLines(logging.Formatter):
    """Formats a record as JSON: time, level, logger and message; trace, tenant and traceback if there are any."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        } | _origin()
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextLines(logging.Formatter):
    """Formats a record as one line for a person, with its traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S")
        origin = "".join(f" {name}={value}" for name, value in _origin().items())
        text = f"{time} {record.levelname:<7} {' '.join(record.getMessage().splitlines())}{origin}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _origin() -> dict[str, str]:
    trace, tenant = tracing.current(), TENANT.get()
    return ({"trace": trace.trace_id} if trace is not None else {}) | ({"tenant": tenant} if tenant else {})


def configure(level: str, form: Literal["json", "text"] = "json") -> None:
    """Send our own log to standard error. Libraries and the learning code log warnings only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("isthmus.cloud").setLevel(level.upper())
