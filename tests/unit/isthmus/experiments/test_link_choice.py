"""The choice replayed on links, small: the bounds hold, and a policy that ignores the link is seen to be worse."""

from pathlib import Path
from typing import Any

import pytest

from isthmus.cli import main
from isthmus.experiments import link_choice
from isthmus.experiments.link_choice import MEASURED, RATIOS, compare, recorded, run, simulate, table, worlds
from isthmus.link.model import Trace

SHORT = {"seed": 3, "duration_s": 150.0, "every_s": 0.5, "budget_s": 0.3}


@pytest.mark.parametrize("name", ["umts", "tunnel", "slow"])
def test_the_device_keeps_its_bounds(name: str) -> None:
    world = next(each for each in worlds(3, 150.0) if each.name == name)
    row = compare(world, **SHORT)  # type: ignore[arg-type]
    assert all(row["holds"].values()), row
    assert row["outcomes"]["oracle"]["cloud_share"] > 0.3
    assert row["outcomes"]["never cloud"]["accuracy"] == pytest.approx(MEASURED.accuracy)


def test_a_connection_that_is_lost_without_a_word_is_replaced() -> None:
    world = next(each for each in worlds(3, 150.0) if each.name == "forgetful")
    device = compare(world, **SHORT)["outcomes"]["device"]  # type: ignore[arg-type]
    assert device["cloud_share"] > 0.95


def test_a_recorded_uplink_is_a_world(tmp_path: Path) -> None:
    steady = recorded(tmp_path / "uplink.trace", Trace(tuple(number / 100 for number in range(1, 101))))
    assert steady.name == "uplink"
    assert compare(steady, **SHORT)["share_of_oracle"] > 0.97  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_result() -> None:
    policy = link_choice.make_policy(512, RATIOS, tuple(link_choice.NumberType), 0.3)
    world = worlds(1, 60.0)[0]

    def once() -> Any:
        return simulate(
            world, lambda history, current, now_s: policy.settings[-1], policy, seed=1, duration_s=60.0, every_s=1.0
        )

    assert once() == once()


def test_the_command_writes_its_result_and_fails_if_a_bound_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(link_choice, "worlds", lambda seed, duration_s: [])
    (tmp_path / "uplink.trace").write_text("10\n20\n")
    options = ["--seeds", "1", "--duration-s", "60", "--traces", str(tmp_path / "uplink.trace")]
    with pytest.raises(SystemExit) as ended:
        main(["experiment", "link", "--out", str(tmp_path / "a.json"), *options])
    assert not ended.value.code
    assert "uplink 0" in capsys.readouterr().out
    monkeypatch.setattr(link_choice, "SHARE_OF_ORACLE", 1.1)
    with pytest.raises(SystemExit) as ended:
        main(["experiment", "link", "--out", str(tmp_path / "a.json"), *options])
    assert ended.value.code == 1
    found = run(tmp_path / "b.json", [], seeds=1, duration_s=60.0, every_s=1.0, budget_s=0.3)
    assert list(table(found)) == []
