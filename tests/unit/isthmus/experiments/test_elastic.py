"""The grid of policies, loads and seeds, tiny; and `isthmus elastic replay`."""

import json
from pathlib import Path

from typer.testing import CliRunner

from isthmus.cloud.commands.elastic import app as elastic
from isthmus.cloud.elastic.scheduling.profile import Profile, paper_profile
from isthmus.experiments.cli import app as experiment
from isthmus.experiments.elastic import comparison

LLM = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:{17 + i // 60}:{i % 60:02d}.0000000,1,1\n" for i in range(0, 170, 7)
)


def test_a_grid_is_run_kept_and_reported(tmp_path: Path) -> None:
    (tmp_path / "llm.csv").write_text(LLM, encoding="utf-8")
    reported: list[str] = []

    def once() -> dict[str, object]:
        return comparison.run(
            ["paper", "modelled"],
            ["synthetic", str(tmp_path / "llm.csv")],
            loads=[1.5],
            seeds=[0],
            out=tmp_path / "out",
            report=reported.append,
            duration_s=2,
            policies=["priced", "pets", "infaas", "fixed:0", "fixed:2"],
        )

    result = once()
    assert len(reported) == 4
    page = (tmp_path / "out" / "result.md").read_text()
    assert "priced over PetS" in page and "### modelled profile, llm" in page
    for cell in json.loads((tmp_path / "out" / "result.json").read_text())["cells"]:
        for row in cell["rows"]:
            assert 0 <= row["of_bound"] <= 1
    for path in (tmp_path / "out" / "cells").iterdir():
        path.write_text(path.read_text().replace('"queries": ', '"queries": 1'))
    kept = once()
    assert kept != result, "finished cells are read back, not run again"
    (tmp_path / "llm.csv").write_text(LLM.replace("18:", "19:", 1), encoding="utf-8")
    changed = once()["cells"]
    assert isinstance(changed, list) and isinstance(kept["cells"], list)
    again = [one["trace"] for one, before in zip(changed, kept["cells"], strict=True) if one != before]
    assert again == ["llm", "llm"], "another trace under the same name is simulated"


def test_the_command_draws_every_picture(tmp_path: Path) -> None:
    args = [
        "elastic",
        "--out",
        str(tmp_path),
        "--profile",
        "paper",
        "--seeds",
        "0",
        "--loads",
        "2",
        "--duration-s",
        "1",
    ]
    result = CliRunner().invoke(experiment, [*args, "--policies", "priced,infaas"])
    assert result.exit_code == 0, result.output
    pictures = list((tmp_path / "pictures").iterdir())
    assert len(pictures) == 12
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    broken = CliRunner().invoke(experiment, [*args, "--policies", "best"])
    assert broken.exit_code == 1 and "no policy 'best'" in broken.output
    nothing = CliRunner().invoke(experiment, [*args, "--loads", "0"])
    assert nothing.exit_code == 2 and "0 is not above 0" in nothing.output


def test_the_modelled_profile_merges_cheaply() -> None:
    profile = comparison.modelled_profile()
    assert Profile.from_json(profile.to_json()) == profile
    assert 2.5 < profile.capacity_per_s(-16) / profile.capacity_per_s(0) < 3.2
    assert profile.capacity_per_s(4) < profile.capacity_per_s(0)


def replayed(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(elastic, ["replay", *args])
    return result.exit_code, result.output


def test_replay_says_what_became_of_a_trace(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(paper_profile().to_json(), encoding="utf-8")
    out = tmp_path / "run.json"
    args = ["synthetic", "--duration-s", "2", "--load", "2", "--policy", "exact", "--profile", str(profile)]
    code, output = replayed(*args, "--out", str(out))
    assert code == 0 and "no policy passes" in output and "correct in time" in output
    found = json.loads(out.read_text())
    assert found["expected_utility"] <= found["bound"]
    assert len(found["each"]) == found["batches"]


def test_replay_simulates_infaas_with_the_memory_that_its_name_gives() -> None:
    args = ["synthetic", "--duration-s", "2", "--load", "1"]
    utilities = []
    for policy, executors in (("infaas:0.4", 1), ("infaas", 1), ("infaas", 3)):
        code, output = replayed(*args, "--policy", policy, "--executors", str(executors))
        assert code == 0 and f"{policy} on synthetic, simulated" in output
        utilities.append(float(output.split("expected ")[1].split(";")[0]))
    assert utilities[2] > 2.5 * utilities[1], "the load grows with the executors, and they serve it"
    assert utilities[0] < 0.8 * utilities[1], "with room for one model, every change of task loads one"


def test_replay_says_what_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("a,b\n", encoding="utf-8")
    for args in (
        [str(bad)],
        [str(tmp_path / "none.csv")],
        ["synthetic", "--policy", "best"],
        ["synthetic", "--policy", "infaas:all"],
        ["synthetic", "--policy", "infaas", "--live"],
        ["synthetic", "--profile", str(bad)],
    ):
        code, output = replayed(*args)
        assert code == 1 and "isthmus elastic replay:" in output
