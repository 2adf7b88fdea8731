"""Scripts of a link: a YAML or JSON file that says how each direction behaves over time.

    seed: 7
    repeat: true
    up:                       # from the caller of --listen towards --to
      - {for_s: 20, rate_bytes_s: 125000, delay_ms: 40, jitter_ms: 10}
      - {for_s: 5, stall: true}
    down:
      - {trace: downlink.trace, delay_ms: 40}

Names and meanings are those of ``model.Phase``; delays are in milliseconds here. A missing direction passes everything
at once. ``trace`` is a path, relative to the script, of a Mahimahi packet-delivery trace: one line per packet of 1,500
bytes, with the millisecond at which it may leave.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from isthmus.link.model import Direction, Phase, Trace

MAX_SCRIPT_BYTES: Final = 1 << 20
MAX_PHASES: Final = 100_000
MAX_TRACE_BYTES: Final = 64 << 20

_MILLISECONDS: Final = {"delay_ms": "delay_s", "jitter_ms": "jitter_s", "connect_delay_ms": "connect_delay_s"}
_NUMBERS: Final = frozenset({"for_s", "rate_bytes_s", "loss", "corrupt_every_bytes", "cut_every_bytes"})
_SWITCHES: Final = frozenset({"stall", "half_open", "cut", "refuse"})
_KNOWN: Final = {*_MILLISECONDS, *_NUMBERS, *_SWITCHES, "trace", "cut_at_byte"}


class BadScript(ValueError):
    """A script or a trace that cannot be used. The message names the file and the place."""


@dataclass(frozen=True)
class Script:
    """Both directions of a link. ``up`` leads from the caller to the server. ``seed``: of all random numbers."""

    up: Direction = field(default_factory=Direction)
    down: Direction = field(default_factory=Direction)
    seed: int = 0


def read_script(path: Path) -> Script:
    """Read a script: JSON if the name ends in .json, else YAML. Raises BadScript, and OSError if there is no file."""
    with path.open("rb") as file:
        raw = file.read(MAX_SCRIPT_BYTES + 1)
    if len(raw) > MAX_SCRIPT_BYTES:
        raise BadScript(f"{path}: a script has at most {MAX_SCRIPT_BYTES >> 20} MiB")
    try:
        text = raw.decode("utf-8")
        content = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except (ValueError, RecursionError) as error:
        raise BadScript(f"{path}: cannot be read: {error}") from error
    try:
        return script_of(content, path.parent)
    except BadScript:
        raise
    except ValueError as error:
        raise BadScript(f"{path}: {error}") from error


def script_of(content: Any, folder: Path) -> Script:
    """Make a script of parsed YAML or JSON; paths of traces are relative to ``folder``.

    Raises ValueError that names the place, and OSError if a trace cannot be read.
    """
    if not isinstance(content, Mapping):
        raise ValueError("a script is a mapping with the keys up and down")
    unknown = set(map(str, content)) - {"up", "down", "seed", "repeat"}
    if unknown:
        raise ValueError(f"unknown key {min(unknown)!r}; known are up, down, seed, repeat")
    seed, repeat = content.get("seed", 0), content.get("repeat", False)
    if type(seed) is not int or type(repeat) is not bool:
        raise ValueError("seed is a whole number and repeat is true or false")
    directions = {}
    for name in ("up", "down"):
        listed = content.get(name, [{}])
        if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_PHASES:
            raise ValueError(f"{name}: a list of 1 to {MAX_PHASES} phases is expected")
        phases = []
        for number, each in enumerate(listed, 1):
            try:
                phases.append(_phase(each, folder))
            except BadScript:
                raise
            except ValueError as error:
                raise ValueError(f"{name}, phase {number}: {error}") from error
        try:
            directions[name] = Direction(tuple(phases), repeat=repeat and name in content)
        except ValueError as error:
            raise ValueError(f"{name}, {error}") from error
    return Script(directions["up"], directions["down"], seed)


def read_trace(path: Path) -> Trace:
    """Read a Mahimahi packet-delivery trace. Raises BadScript, and OSError if there is no file."""
    with path.open("rb") as file:
        raw = file.read(MAX_TRACE_BYTES + 1)
    if len(raw) > MAX_TRACE_BYTES:
        raise BadScript(f"{path}: a trace has at most {MAX_TRACE_BYTES >> 20} MiB")
    times = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        text = line.strip()
        if not text:
            continue
        if not text.isdigit() or len(text) > 12:
            raise BadScript(f"{path}, line {number}: expected a whole number of milliseconds")
        times.append(int(text) / 1000)
    try:
        return Trace(tuple(times))
    except ValueError as error:
        raise BadScript(f"{path}: {error}") from error


def _phase(content: Any, folder: Path) -> Phase:
    if not isinstance(content, Mapping):
        raise ValueError("a phase is a mapping, such as {for_s: 5, delay_ms: 40}")
    unknown = set(map(str, content)) - _KNOWN
    if unknown:
        raise ValueError(f"unknown key {min(unknown)!r}; known are {', '.join(sorted(_KNOWN))}")
    values: dict[str, Any] = {}
    for name, value in ((str(key), value) for key, value in content.items()):
        if name in _SWITCHES:
            if type(value) is not bool:
                raise ValueError(f"{name} is true or false")
            values[name] = value
        elif name == "trace":
            values["trace"] = read_trace(folder / str(value))
        elif name == "cut_at_byte":
            several = value if isinstance(value, list) else [value]
            if any(type(each) is not int for each in several):
                raise ValueError("cut_at_byte is a whole number, or a list with one per connection")
            values["cut_at_byte"] = tuple(value) if isinstance(value, list) else value
        else:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name} is a number")
            values[_MILLISECONDS.get(name, name)] = float(value) / (1000 if name in _MILLISECONDS else 1)
    assert set(values) <= {known.name for known in fields(Phase)}
    return Phase(**values)


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ValueError(
            "a script in YAML needs the package pyyaml: pip install 'isthmus[link]', or write the script as .json"
        ) from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
