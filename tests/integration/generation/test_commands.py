"""``isthmus generate`` from the command line: convert, profile, replay."""

import json
from pathlib import Path

import pytest

from isthmus import cli
from isthmus.cloud.generation.scheduling.profile import GenerationProfile
from tests.rigs.generation import save_tiny_llama


def isthmus(*words: object) -> int:
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1


def test_a_machine_is_measured_and_a_workload_replayed_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_llama(tmp_path / "model", max_position_embeddings=64)
    assert isthmus("generate", "profile", tmp_path / "model", "--out", tmp_path / "profile.json", "--repeats", 1) == 0
    found = GenerationProfile.from_json((tmp_path / "profile.json").read_text())
    assert found.key.number_type == "float32" and len(found.grid) == 7
    assert "mean error of the fit" in capsys.readouterr().out
    out = tmp_path / "replay.json"
    words = ("--requests", 40, "--load", 0.5, "--heavy", 0.8, "--policy", "vtc", "--out", out)
    assert isthmus("generate", "replay", "chat", "--profile", tmp_path / "profile.json", *words) == 0
    printed = capsys.readouterr().out
    assert "vtc on chat, load 0.5, seed 0: 40 requests" in printed
    figures = json.loads(out.read_text())
    assert figures["outcomes"]["finished"] == 40
    assert figures["goodput"] <= figures["bound_goodput"] + 1e-6
    assert figures["latency_s"]["mean"] >= figures["bound_mean_s"]
    assert set(figures["users"]) == {"u0", "u1", "u2", "u3", "u4"} or len(figures["users"]) > 1


def test_a_recorded_trace_is_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:17:{second:02}.0,{80 * second + 80},{second + 1}" for second in range(20)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows))
    assert isthmus("generate", "replay", trace, "--policy", "srpt", "--lengths", "known") == 0
    assert "20 requests, 210 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("replay", "lmas"), "no workload 'lmas': give lmaas, chat or the CSV file of a trace. Did you mean 'lmaas'?"),
        (("replay", "--policy", "best"), "no policy 'best'; known are static, orca"),
        (("profile", "nowhere", "--out", "x.json"), "nowhere has no config.json; give a model directory"),
        (("convert", "nowhere.gguf", "--out", "x"), "nowhere.gguf: No such file or directory"),
    ],
)
def test_what_cannot_be_done_ends_in_one_line(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isthmus("generate", *words) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"isthmus generate {words[0]}: ") and said in line
