"""A device from its first start to a better student, over a cloud in memory, with real clips and real ONNX files."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.edge.agent.device_run import DeviceRun, InferConfig
from isthmus.edge.agent.enrolling import enrol_anew
from isthmus.edge.agent.live import LiveAnswers, Worker
from isthmus.edge.agent.report import write_report
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.behaviour.state import Answering, Phase, answering
from isthmus.edge.capture.clip_plan import ClipPlan, plan_clips
from isthmus.edge.capture.sources import replay
from isthmus.edge.link.interface import MemoryLink
from isthmus.edge.own_clips.budget import Budget
from isthmus.proto.errors import Corrupt, InvalidInput
from isthmus.proto.messages import UploadMode
from tests.rigs.data.clips import TAKES
from tests.rigs.edge.device import device


def test_the_whole_run_and_its_report(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    cloud = students.cloud()
    runtime, state, _ = device(tmp_path / "device", cloud, plan)
    report = DeviceRun(runtime, state, plan, InferConfig(ratios=(1.0, 1.5)), cloud="memory").execute()
    runtime.close()
    write_report(tmp_path / "report.json", report)
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["students"] == {"base": "base", "interim": ["interim"], "final": "final", "refused": ""}
    assert (read["failure"], read["job"]["stage"]) == ("", "ready")
    assert [each["round"] for each in read["prototypes"]["rounds"]] == [0, 1]
    assert read["prototypes"]["min_size"] >= 3
    assert all(min(each["sizes"]) >= 3 and sum(each["sizes"]) == 8 for each in read["prototypes"]["rounds"])
    assert len(read["predictions"]) == 8
    for prediction in read["predictions"]:
        assert set(prediction["cloud"]) == {"1", "1.5"}
        assert None not in (prediction["before"], prediction["local"], *prediction["cloud"].values())
        # The cloud's students know no FEA: such a clip has no label here.
        assert prediction["label"] == {"NEU": 0, "HAP": 1, "SAD": 2, "FEA": None}[prediction["name"].split("_")[2]]
    assert read["accuracy"]["clips_with_label"] == 6
    assert 0 <= read["accuracy"]["cloud"]["1"] <= 1
    frames = read["bytes"]["up"]["inference"]
    assert frames["1"] > frames["1.5"] > 0
    assert read["bytes"]["raw_test_clips"] > 100 * read["bytes"]["up"]["prototypes"] / 2
    assert read["link"]["round_trip_s"] >= 0
    assert read["rss_bytes"] > 1 << 20
    assert read["ms_per_clip"]["encode"]["median"] > 0
    assert {"enrol", "fetch_base", "make_prototypes", "upload", "fetch_final", "swap_final", "infer"} <= set(
        read["wall_s"]["stages"]
    )
    # No name or label of a clip leaves the device: only rows of numbers went up.
    assert all(upload.values_KC.shape[1] == 3 for upload in cloud.uploads.values())


def test_clips_with_only_sound_or_picture_are_answered_and_counted(students: Any, clips: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(clips, data)
    heard = [f"1001_A{number:02}_NEU_XX" for number in range(TAKES)]
    seen = [f"1001_A{number:02}_HAP_XX" for number in range(TAKES)]
    broken = "1001_A00_SAD_XX"  # the picture cannot be read: a damaged clip, not one with sound only
    for name in heard:
        (data / "VideoFlash" / f"{name}.flv").unlink()
    for name in seen:
        (data / "AudioWAV" / f"{name}.wav").unlink()
    (data / "VideoFlash" / f"{broken}.flv").write_bytes(b"no film")
    plan = plan_clips(data, seed=1)
    runtime, state, _ = device(tmp_path / "device", students.cloud(), plan)
    report: Any = DeviceRun(runtime, state, plan, InferConfig(ratios=(1.0, 1.5)), cloud="memory").execute()
    runtime.close()
    assert list(report["clips"]["skipped"]) == [broken]
    tested = {each["name"]: each for each in report["predictions"]}
    counted = report["clips"]["captured"]
    assert counted == {
        "both": len(tested.keys() - {*heard, *seen}),
        "sound": len(tested.keys() & {*heard}),
        "picture": len(tested.keys() & {*seen}),
    }
    assert min(counted.values()) > 0
    for name, prediction in tested.items():
        assert prediction["captured"] == ("sound" if name in heard else "picture" if name in seen else "both")
        assert None not in (prediction["before"], prediction["local"], *prediction["cloud"].values())
    by_captured = report["accuracy"]["captured"]
    assert by_captured["sound"]["clips_with_label"] == counted["sound"]
    assert by_captured["sound"]["local"] == np.mean([tested[name]["local"] == 0 for name in heard if name in tested])
    assert by_captured["picture"]["cloud"]["1.5"] == np.mean(
        [tested[name]["cloud"]["1.5"] == 1 for name in seen if name in tested]
    )


def test_a_ratio_the_student_does_not_have(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    runtime, state, _ = device(tmp_path, students.cloud(), plan)
    with pytest.raises(InvalidInput, match=r"no ratio 7; it has 1, 1\.5"):
        DeviceRun(runtime, state, plan, InferConfig(ratios=(7.0,)), cloud="memory").execute()


def test_too_few_clips(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    few = replace(plan, selection=plan.selection[:2])
    runtime, _, _ = device(tmp_path, students.cloud(), few)
    state = runtime.run()
    assert "2 clips are too few" in state.failure
    assert not runtime.link.traffic.up_bytes["prototypes"]


def test_personalising_again_starts_from_the_finished_student(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    cloud = students.cloud()
    first, _, _ = device(tmp_path, cloud, plan)
    first.run()
    first.close()
    second, state, _ = device(tmp_path, cloud, plan)
    second.personalise_again()
    assert second.run().base_id == "final"
    assert sorted(cloud.jobs.values()) == ["job-1", "job-2"]
    assert len(state.ledger()) == 4


def test_noise_is_in_the_ledger(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    config = RunConfig("kiosk", seed=1)
    config = replace(config, choices=replace(config.choices, noise=2.0))
    runtime, state, _ = device(tmp_path, students.cloud(), plan, config=config)
    report: Any = DeviceRun(runtime, state, plan, InferConfig(), cloud="memory").execute()
    assert report["prototypes"]["epsilon_spent"] == 4.0
    assert [entry.epsilon for entry in state.ledger()] == [2.0, 2.0]


def test_features_leave_the_device_only_if_its_user_chose_so(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    config = RunConfig("kiosk", seed=1)
    config = replace(config, choices=replace(config.choices, mode=UploadMode.FEATURES))
    runtime, state, _ = device(tmp_path / "chosen", students.cloud(), plan, config=config)
    runtime.run(until=Phase.ENCODE)
    made = runtime.clips.prototypes(runtime.state.active_id, in_use=())
    assert made.features_KE is not None
    assert made.features_KE.shape == (len(made.sizes_K), 2 * runtime.enrolment.feature_width)
    assert int(made.sizes_K.min()) >= 3
    runtime.run()
    assert {entry.mode for entry in state.ledger()} == {"features"}
    default, state, _ = device(tmp_path / "default", students.cloud(), plan)
    default.run()
    assert {entry.mode for entry in state.ledger()} == {"prototypes"}
    assert default.clips.prototypes(default.state.active_id, in_use=()).features_KE is None


def test_secrets_are_for_the_owner_only(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    runtime, state, _ = device(tmp_path, students.cloud(), plan)
    runtime.run(until=Phase.ENCODE)
    assert (tmp_path / "credentials.json").stat().st_mode & 0o077 == 0
    (tmp_path / "agent.json").write_text("{")
    with pytest.raises(Corrupt, match=r"agent\.json cannot be read"):
        state.agent()


def test_live_clips_fall_back_to_the_device_and_return(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    cloud = students.cloud()
    runtime, _, clock = device(tmp_path, cloud, plan)
    runtime.run()
    live = LiveAnswers(runtime, Worker(), 0.5, clock.sleep)
    taken = next(replay(plan.test[:1], runtime.spec, clock, runtime.damage))
    through_cloud = live.answer(taken, 0.0)
    assert through_cloud.setting is not None
    cloud.reachable = False
    alone = live.answer(taken, 0.0)
    assert alone.setting is None
    assert alone.answer.predicted is not None
    assert answering(runtime.state) is Answering.LOCAL
    cloud.reachable = True
    clock.sleep(60)
    assert live.answer(taken, 0.0).setting is not None
    live.close()


def test_nothing_in_memory_holds_a_thread(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    runtime, _, _ = device(tmp_path, students.cloud(), plan)
    runtime.run()
    runtime.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("isthmus")]


def with_noise(epsilon: float, **changes: Any) -> RunConfig:
    config = RunConfig("kiosk", seed=1, **changes)
    return replace(config, choices=replace(config.choices, noise=epsilon))


def test_the_budget_counts_through_another_personalisation_and_another_identity(
    students: Any, plan: ClipPlan, tmp_path: Path
) -> None:
    cloud = students.cloud()
    first, state, _ = device(tmp_path, cloud, plan, config=with_noise(1.0, rounds=2))
    first.run()
    first.close()
    assert state.budget() == Budget(3, 2.0)
    again, _, _ = device(tmp_path, cloud, plan, config=with_noise(1.0, rounds=2))
    again.personalise_again()
    ended = again.run()
    assert "epsilon 2 and 2 of it is spent" in ended.failure
    assert ended.active_id == "final", "the student in use answers on"
    again.close()
    assert enrol_anew(with_noise(1.0), state, MemoryLink(cloud)) == "device-1"
    anew, _, _ = device(tmp_path, cloud, plan, config=with_noise(1.0, rounds=2))
    assert "is spent" in anew.run().failure
    anew.close()
    raised, _, _ = device(tmp_path, cloud, plan, config=with_noise(1.0, rounds=2, epsilon_budget=3.0))
    raised.run()
    assert [entry.epsilon for entry in state.ledger()] == [1.0, 1.0, 1.0], "one more fits, and no second round"
