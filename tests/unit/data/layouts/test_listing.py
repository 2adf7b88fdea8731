"""CREMA-D's and AVE's published layouts: names, lists, order, and files that do not fit."""

from pathlib import Path

import pytest

from isthmus.data.layouts import ave, crema_d
from isthmus.data.layouts.listing import detect, read_listing


def _crema_d(root: Path, *names: str) -> Path:
    for folder, suffix in ((crema_d.AUDIO_FOLDER, "wav"), (crema_d.VIDEO_FOLDER, "flv")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (root / folder / f"{name}.{suffix}").write_bytes(b"x")
    return root


def _ave(root: Path, **lists: str) -> Path:
    (root / ave.VIDEO_FOLDER).mkdir(parents=True)
    for name, text in {"trainSet": "", "valSet": "", "testSet": "", **lists}.items():
        (root / f"{name}.txt").write_text(text)
        for line in filter(None, text.splitlines()):
            (root / ave.VIDEO_FOLDER / f"{line.split('&')[1]}.mp4").write_bytes(b"x")
    return root


def test_crema_d_reads_names_in_order(tmp_path: Path) -> None:
    listing = read_listing(
        _crema_d(tmp_path, "1002_IEO_HAP_HI", "1001_DFA_ANG_XX", "1040_ITH_SAD_X", "1003_A01_NEU_C0")
    )
    assert listing.layout == "crema-d"
    assert listing.classes == ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")
    assert [(ref.name, ref.actor, ref.label) for ref in listing.refs] == [
        ("1001_DFA_ANG_XX", "1001", 5),
        ("1002_IEO_HAP_HI", "1002", 1),
        ("1003_A01_NEU_C0", "1003", 0),
        ("1040_ITH_SAD_X", "1040", 2),
    ]
    assert listing.damaged == ()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("readme", "does not parse"), ("1001_DFA_ANG", "does not parse"), ("1001_DFA_JOY_XX", "emotion 'JOY'")],
)
def test_crema_d_names_that_do_not_parse_are_damage(tmp_path: Path, name: str, reason: str) -> None:
    listing = read_listing(_crema_d(tmp_path, "1001_DFA_ANG_XX", name))
    assert [ref.name for ref in listing.refs] == ["1001_DFA_ANG_XX"]
    assert [damage.name for damage in listing.damaged] == [name]
    assert reason in listing.damaged[0].reason


def test_crema_d_clips_with_one_file_are_kept_apart_from_the_whole_and_the_damaged(tmp_path: Path) -> None:
    root = _crema_d(tmp_path, "1001_DFA_ANG_XX", "1001_DFA_SAD_XX", "1001_DFA_NEU_XX")
    (root / "AudioWAV/1001_DFA_SAD_XX.wav").unlink()
    (root / "VideoFlash/1001_DFA_NEU_XX.flv").unlink()
    (root / "AudioWAV/.hidden.wav").write_bytes(b"x")
    listing = read_listing(root)
    assert [ref.name for ref in listing.refs] == ["1001_DFA_ANG_XX"]
    assert listing.damaged == ()
    neutral, sad = listing.incomplete
    assert (neutral.name, neutral.video_path, neutral.label) == ("1001_DFA_NEU_XX", None, 0)
    assert (sad.name, sad.audio_path, sad.actor) == ("1001_DFA_SAD_XX", None, "1001")
    assert neutral.audio_path == root / "AudioWAV/1001_DFA_NEU_XX.wav"


def test_crema_d_reads_other_endings_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    root = _crema_d(tmp_path, "1001_DFA_ANG_XX", "1001_DFA_SAD_XX", "1001_DFA_NEU_XX")
    film, sound = root / "VideoFlash", root / "AudioWAV"
    (film / "1001_DFA_ANG_XX.flv").rename(film / "1001_DFA_ANG_XX.mp4")
    (sound / "1001_DFA_ANG_XX.wav").rename(sound / "1001_DFA_ANG_XX.WAV")
    (film / "1001_DFA_SAD_XX.mp4").write_bytes(b"x")
    (sound / "notes.txt").write_text("x")
    (sound / "old").mkdir()
    (sound / "Thumbs.db").write_bytes(b"x")
    (film / "1001_DFA_HAP_XX.flv.dvc").write_text("outs:\n")
    listing = read_listing(root)
    assert [ref.name for ref in listing.refs] == ["1001_DFA_ANG_XX", "1001_DFA_NEU_XX", "1001_DFA_SAD_XX"]
    angry, _, sad = listing.refs
    assert (angry.audio_path, angry.video_path) == (sound / "1001_DFA_ANG_XX.WAV", film / "1001_DFA_ANG_XX.mp4")
    assert sad.video_path == film / "1001_DFA_SAD_XX.flv"
    assert (listing.damaged, listing.incomplete) == ((), ())
    left_out = {each.name: each.reason for each in listing.left_out}
    assert left_out.keys() == {
        "AudioWAV/notes.txt",
        "AudioWAV/old",
        "VideoFlash/1001_DFA_SAD_XX.mp4",
        "VideoFlash/1001_DFA_HAP_XX.flv.dvc",
    }
    assert "1001_DFA_SAD_XX.flv is read instead" in left_out["VideoFlash/1001_DFA_SAD_XX.mp4"]
    assert "dvc pull" in left_out["VideoFlash/1001_DFA_HAP_XX.flv.dvc"]


def test_links_whose_target_is_not_here_are_damage(tmp_path: Path) -> None:
    root = _crema_d(tmp_path / "crema", "1001_DFA_ANG_XX", "1001_DFA_SAD_XX")
    for path in (root / "AudioWAV/1001_DFA_ANG_XX.wav", root / "VideoFlash/1001_DFA_ANG_XX.flv"):
        path.unlink()
        path.symlink_to(f"../.git/annex/objects/{path.name}")
    lone = root / "VideoFlash/1001_DFA_SAD_XX.flv"
    lone.unlink()
    lone.symlink_to("/nowhere/at/all.flv")
    listing = read_listing(root)
    assert listing.refs == ()
    assert [ref.name for ref in listing.incomplete] == ["1001_DFA_SAD_XX"]
    assert [damage.name for damage in listing.damaged] == ["VideoFlash/1001_DFA_SAD_XX.flv", "1001_DFA_ANG_XX"]
    assert "/nowhere/at/all.flv, which is not here: fetch it" in listing.damaged[0].reason
    assert "annex" in listing.damaged[1].reason
    root = _ave(tmp_path / "ave", testSet="Flute&v1&good&0&9\n")
    (root / "AVE/v1.mp4").unlink()
    (root / "AVE/v1.mp4").symlink_to("gone.mp4")
    assert "gone.mp4, which is not here" in read_listing(root).damaged[0].reason


def test_ave_videos_of_any_ending_and_those_in_no_list(tmp_path: Path) -> None:
    root = _ave(tmp_path, testSet="Flute&v1&good&0&9\nFlute&v2&good&0&9\n")
    (root / "AVE/v1.mp4").rename(root / "AVE/v1.MP4")
    (root / "AVE/v2.mp4").rename(root / "AVE/v2.mkv")
    (root / "AVE/v3.mp4").write_bytes(b"x")
    listing = read_listing(root)
    assert [ref.video_path for ref in listing.refs] == [root / "AVE/v1.MP4", root / "AVE/v2.mkv"]
    assert [each.name for each in listing.left_out] == ["AVE/v3.mp4"]
    assert "in none of" in listing.left_out[0].reason


def test_crema_d_without_one_of_its_folders(tmp_path: Path) -> None:
    (tmp_path / "AudioWAV").mkdir()
    with pytest.raises(ValueError, match="VideoFlash is missing"):
        read_listing(tmp_path)


def test_ave_orders_classes_by_first_appearance_in_the_test_list(tmp_path: Path) -> None:
    root = _ave(
        tmp_path,
        trainSet="Bark&bbbbbbbbbbb&good&0&10\nFlute&fffffffffff&good&2&7\n",
        valSet="Horse&hhhhhhhhhhh&good&0&3\n",
        testSet="Flute&-f_1&good&0&10\r\nBark&b2&bad&1&4\r\n\r\n",
    )
    listing = read_listing(root)
    assert listing.layout == "ave"
    assert listing.classes == ("Flute", "Bark", "Horse")
    assert [(ref.name, ref.label, ref.start_s, ref.end_s) for ref in listing.refs] == [
        ("-f_1", 0, 0, 10),
        ("b2", 1, 1, 4),
        ("bbbbbbbbbbb", 1, 0, 10),
        ("fffffffffff", 0, 2, 7),
        ("hhhhhhhhhhh", 2, 0, 3),
    ]
    assert ave.read_lists(root) == {
        "trainSet.txt": ("bbbbbbbbbbb", "fffffffffff"),
        "valSet.txt": ("hhhhhhhhhhh",),
        "testSet.txt": ("-f_1", "b2"),
    }


def test_ave_videos_in_two_categories_are_two_clips(tmp_path: Path) -> None:
    listing = read_listing(
        _ave(tmp_path, trainSet="Bark&v1&good&0&5\n", testSet="Flute&v1&good&5&10\nFlute&v2&good&0&9\n")
    )
    assert [(ref.name, ref.label, ref.start_s) for ref in listing.refs] == [
        ("v1#Bark", 1, 0),
        ("v1#Flute", 0, 5),
        ("v2", 0, 0),
    ]
    assert len({ref.audio_path for ref in listing.refs}) == 2


@pytest.mark.parametrize("name", ["trainSet.txt", "valSet.txt", "testSet.txt"])
def test_ave_names_the_split_list_that_is_missing(tmp_path: Path, name: str) -> None:
    root = _ave(tmp_path, testSet="Flute&v2&good&0&9\n")
    (root / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        read_listing(root)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("Flute&v1&good&0", "4 fields"),
        ("Flute&../../etc/passwd&good&0&10", "no video id"),
        ("Flute&v1&good&7&3", "cannot last"),
        ("Flute&v1&good&0&nan", "cannot last"),
        ("Flute&v1&good&zero&3", "no time"),
        ("&v1&good&0&3", "label is empty"),
    ],
)
def test_ave_lines_that_do_not_parse_are_damage(tmp_path: Path, line: str, reason: str) -> None:
    root = _ave(tmp_path, testSet="Flute&v2&good&0&9\n")
    (root / "valSet.txt").write_text(f"\n{line}\n")
    listing = read_listing(root)
    assert [ref.name for ref in listing.refs] == ["v2"]
    assert [damage.name for damage in listing.damaged] == ["valSet.txt:2"]
    assert reason in listing.damaged[0].reason


def test_ave_events_without_video_are_damage(tmp_path: Path) -> None:
    root = _ave(tmp_path, testSet="Flute&v1&good&0&9\nFlute&v2&good&0&9\n")
    (root / "AVE/v1.mp4").unlink()
    listing = read_listing(root)
    assert [ref.name for ref in listing.refs] == ["v2"]
    assert "AVE/v1.mp4 is missing" in listing.damaged[0].reason


def test_folders_of_neither_layout_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither the CREMA-D layout"):
        detect(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        read_listing(tmp_path / "nowhere")
    _crema_d(tmp_path / "CREMA-D", "1001_DFA_ANG_XX")
    with pytest.raises(ValueError, match=r"CREMA-D has: did you mean that\?"):
        detect(tmp_path)
    with pytest.raises(ValueError, match="no layout 'avi'"):
        read_listing(tmp_path, "avi")
