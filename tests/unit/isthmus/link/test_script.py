"""Scripts in YAML and JSON, Mahimahi traces, and what is said about broken ones."""

import json
from pathlib import Path

import pytest

from isthmus.link.script import BadScript, read_script, read_trace


def test_yaml_and_json_give_the_same_script(tmp_path: Path) -> None:
    (tmp_path / "down.trace").write_text("0\n4\n4\n 12 \n")
    yaml = "seed: 7\nrepeat: true\nup:\n- {for_s: 2, delay_ms: 40, cut_at_byte: [5, 9]}\n- {for_s: 1, stall: true}\n"
    content = {
        "seed": 7,
        "repeat": True,
        "up": [{"for_s": 2, "delay_ms": 40, "cut_at_byte": [5, 9]}, {"for_s": 1, "stall": True}],
        "down": [{"for_s": 3, "trace": "down.trace"}],
    }
    (tmp_path / "a.yaml").write_text(yaml + "down:\n- {for_s: 3, trace: down.trace}\n")
    (tmp_path / "a.json").write_text(json.dumps(content))
    script = read_script(tmp_path / "a.yaml")
    assert script == read_script(tmp_path / "a.json")
    assert (script.seed, script.up.repeat, script.up.phases[0].delay_s) == (7, True, 0.04)
    assert script.up.phases[0].cut_at_byte == (5, 9)
    assert script.down.phases[0].trace is not None
    assert script.down.phases[0].trace.at_s == (0.0, 0.004, 0.004, 0.012)


def test_a_direction_that_is_not_named_passes_everything(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"up": [{"delay_ms": 5}]}')
    assert read_script(tmp_path / "a.json").down.phases[0].delay_s == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "a script is a mapping"),
        ("up: [", "cannot be read"),
        ("upp: []", "unknown key 'upp'"),
        ("up: {}", "up: a list of 1 to"),
        ("up: [{delay: 4}]", "up, phase 1: unknown key 'delay'; known are"),
        ("up: [{for_s: 1}, {delay_ms: x}]", "up, phase 2: delay_ms is a number"),
        ("up: [{stall: 1}]", "stall is true or false"),
        ("up: [{cut_at_byte: 1.5}]", "cut_at_byte is a whole number"),
        ("up: [{for_s: -1}]", "up, phase 1: for_s must be above 0"),
        ("seed: x", "seed is a whole number"),
        ("up: [{trace: none.trace}]", "none.trace"),
    ],
)
def test_a_broken_script_is_refused_in_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises((BadScript, OSError)) as refused:
        read_script(tmp_path / "a.yaml")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "at least one line"),
        ("0\n", "longer than 0 ms"),
        ("5\n3\n", "ascend"),
        ("1\nx\n", "line 2"),
        ("-1", "line 1"),
    ],
)
def test_a_broken_trace_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.trace").write_text(text)
    with pytest.raises(BadScript, match=said):
        read_trace(tmp_path / "a.trace")


def test_without_the_yaml_package_json_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    (tmp_path / "a.yaml").write_text("{}")
    (tmp_path / "a.json").write_text("{}")
    read_script(tmp_path / "a.json")
    with pytest.raises(BadScript, match=r"isthmus\[link\]"):
        read_script(tmp_path / "a.yaml")
