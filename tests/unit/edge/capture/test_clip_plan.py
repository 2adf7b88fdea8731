"""The split into clips that make the prototypes and clips that are answered."""

from pathlib import Path

import pytest

from isthmus.edge.capture.clip_plan import plan_clips


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Only names exist: a plan decodes nothing."""
    for actor in ("1001", "1002"):
        for sentence in ("AAA", "BBB", "CCC", "DDD"):
            for emotion in ("NEU", "HAP"):
                for folder, suffix in (("AudioWAV", "wav"), ("VideoFlash", "flv")):
                    path = tmp_path / folder / f"{actor}_{sentence}_{emotion}_XX.{suffix}"
                    path.parent.mkdir(exist_ok=True)
                    path.touch()
    (tmp_path / "VideoFlash" / "1002_DDD_HAP_XX.flv").unlink()
    return tmp_path


def names_file(folder: Path, name: str, *names: str) -> Path:
    path = folder / name
    path.write_text("# a comment\n\n" + "\n".join(names) + "\n")
    return path


def test_halves_of_one_actor(data: Path) -> None:
    plan = plan_clips(data, actors=["1001"], seed=3)
    assert len(plan.selection) == len(plan.test) == 4
    assert {ref.actor for ref in (*plan.selection, *plan.test)} == {"1001"}
    assert not {ref.name for ref in plan.selection} & {ref.name for ref in plan.test}
    assert plan_clips(data, actors=["1001"], seed=3) == plan


def test_labels_follow_the_clouds_order_and_unknown_ones_go(data: Path) -> None:
    plan = plan_clips(data, actors=["1001"]).labelled(("HAP", "SAD"))
    assert {ref.label for ref in plan.test if "_HAP_" in ref.name} == {0}
    assert {ref.label for ref in plan.test if "_NEU_" in ref.name} == {None}


def test_given_lists_a_damaged_clip_and_one_with_sound_alone(data: Path) -> None:
    (data / "AudioWAV" / "1002_DDD_JOY_XX.wav").touch()
    selection = names_file(data, "selection.txt", "1001_AAA_NEU_XX", "1002_DDD_HAP_XX", "1002_DDD_JOY_XX")
    test = names_file(data, "test.txt", "1001_BBB_NEU_XX")
    plan = plan_clips(data, selection_clips=selection, test_clips=test)
    assert [(ref.name, ref.video_path is None) for ref in plan.selection] == [
        ("1001_AAA_NEU_XX", False),
        ("1002_DDD_HAP_XX", True),
    ]
    assert [damage.name for damage in plan.damaged] == ["1002_DDD_JOY_XX"]


def test_clips_with_one_modality_are_a_persons_clips_too(data: Path) -> None:
    plan = plan_clips(data, actors=["1002"])
    assert "1002_DDD_HAP_XX" in {ref.name for ref in (*plan.selection, *plan.test)}
    assert len(plan.selection) + len(plan.test) == 8


def test_what_is_wrong_is_named(data: Path) -> None:
    one = names_file(data, "one.txt", "1001_AAA_NEU_XX")
    unknown = names_file(data, "unknown.txt", "1009_AAA_NEU_XX")
    with pytest.raises(ValueError, match="in both lists"):
        plan_clips(data, selection_clips=one, test_clips=one)
    with pytest.raises(ValueError, match="not in the data set, such as 1009_AAA_NEU_XX"):
        plan_clips(data, selection_clips=one, test_clips=unknown)
    with pytest.raises(ValueError, match="no clips of 1009"):
        plan_clips(data, actors=["1009"])
    with pytest.raises(ValueError, match="cannot be read"):
        plan_clips(data, clips=data / "missing.txt")
    with pytest.raises(ValueError, match="names a clip twice"):
        plan_clips(data, clips=names_file(data, "twice.txt", "a", "a"))
