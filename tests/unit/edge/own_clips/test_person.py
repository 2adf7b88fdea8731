"""The user as the device remembers them: bounds, corrections and their way back, questions, damaged files."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from isthmus.data.class_shares import UNIFORM_SHARE
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.own_clips.corrections import MOST_KEPT, MOST_USED, Correction
from isthmus.edge.own_clips.person import ESTIMATE_EVERY_CLIPS, Person, Said
from isthmus.edge.own_clips.personal import Personal, person_facts, understand
from isthmus.edge.own_clips.window import MOST_CLIPS, Seen, Window
from isthmus.proto.errors import Corrupt, InvalidInput, StorageFull, WrongState
from isthmus.proto.messages import Features
from tests.rigs.distill.people import person_model

CLASSES, WIDTH = ("calm", "happy", "sad"), 6
CENTRED = person_model(len(CLASSES), WIDTH)


def clip(name: str, seed: int, *, sound: bool = True, picture: bool = True) -> Seen:
    rng = np.random.default_rng((7, seed))
    audio_D, visual_D = rng.standard_normal((2, WIDTH)).astype(np.float32)
    features = Features(audio_D if sound else None, visual_D if picture else None)
    return Seen(name, features, rng.dirichlet(np.ones(len(CLASSES))).astype(np.float32))


def clips(count: int) -> list[Seen]:
    return [clip(f"clip-{number}", number) for number in range(count)]


@dataclass
class Memory:
    """Notes in memory. ``full``: the disk has no room."""

    windows: dict[str, Window] = field(default_factory=dict)
    remarks: Said = field(default_factory=Said)
    full: bool = False

    def window(self, student_id: str) -> Window | None:
        return self.windows.get(student_id)

    def save_window(self, student_id: str, window: Window) -> None:
        if self.full:
            raise StorageFull("the disk is full")
        self.windows[student_id] = window

    def keep_windows(self, student_ids: Collection[str]) -> None:
        self.windows = {name: one for name, one in self.windows.items() if name in student_ids}

    def forget_clips(self, names: Collection[str] | None) -> None:
        raise NotImplementedError

    def said(self) -> Said:
        return self.remarks

    def save_said(self, said: Said) -> None:
        self.remarks = said


class Slot:
    """A slot whose students all have the person model, except those named ``plain``."""

    def installed(self, student_id: str) -> Any:
        centred = None if student_id.startswith("plain") else CENTRED
        return SimpleNamespace(manifest=SimpleNamespace(centred=centred, classes=CLASSES))


@dataclass
class Rig:
    notes: Memory = field(default_factory=Memory)

    def person(self, count: int = 30) -> Person:
        person = Person(self.notes, Slot())  # type: ignore[arg-type]
        if count:
            person.begin("s", clips(count), in_use=())
        return person


def same(one: Personal | None, other: Personal | None) -> bool:
    """Return whether both readings are equal to the bit."""
    assert one is not None and other is not None
    changes = [np.zeros(0) if each.change_CE is None else each.change_CE for each in (one, other)]
    return (
        one.offset.offset_MC.tobytes() == other.offset.offset_MC.tobytes()
        and one.offset.prior_C.tobytes() == other.offset.prior_C.tobytes()
        and changes[0].tobytes() == changes[1].tobytes()
        and (one.corrections, one.agreement) == (other.corrections, other.agreement)
    )


def test_undone_corrections_bring_back_the_reading_to_the_bit() -> None:
    person = Rig().person()
    before = person.reading("s")
    person.correct("s", "clip-3", "sad", 1.0)
    first = person.reading("s")
    person.correct("s", "clip-4", "happy", 2.0)
    assert not same(before, first) and not same(first, person.reading("s"))
    gone, reading = person.undo("s")
    assert (gone.clip, gone.label, gone.said_s, gone.student_id) == ("clip-4", "happy", 2.0, "s")
    assert same(reading, first)
    person.undo("s")
    assert same(person.reading("s"), before)
    with pytest.raises(WrongState, match="no correction"):
        person.undo("s")


def test_a_correction_changes_the_answer_and_only_this_device_knows() -> None:
    person = Rig().person()
    asked = clips(30)[3]
    before = person.reading("s")
    assert before is not None
    answer_C = before.local(asked.raw_C, asked.features)
    wrong = int(answer_C.argmin())
    after = person.correct("s", "clip-3", CLASSES[wrong], 1.0)
    assert after.local(asked.raw_C, asked.features)[wrong] > answer_C[wrong]
    assert after.cloud(asked.raw_C, asked.features)[wrong] > before.cloud(asked.raw_C, asked.features)[wrong]
    unsaid = person.unsaid("s")
    assert same(before, unsaid), "what unlabelled clips show is still known"
    assert "1 correction of yours" in " ".join(person_facts(after, CLASSES).sentences)


@pytest.mark.parametrize(
    ("name", "label", "words"),
    [
        ("clip-1", "angry", "'angry' is no class"),
        ("clip-99", "sad", "not among the 30 clips"),
        ("", "sad", "not among"),
    ],
)
def test_a_correction_of_nothing_is_refused(name: str, label: str, words: str) -> None:
    person = Rig().person()
    with pytest.raises(InvalidInput, match=words):
        person.correct("s", name, label, 1.0)
    assert person.said() == Said()


def test_a_student_without_a_person_model_learns_nothing() -> None:
    person = Rig().person()
    for student_id, why in (
        ("plain", "knows too few people"),
        ("not seen yet", "yet: .* when the device personalises"),
    ):
        assert person.reading(student_id) is None and person.unsaid(student_id) is None
        person.add(student_id, clip("new", 1))
        with pytest.raises(WrongState, match=f"cannot learn from corrections.*{why}"):
            person.correct(student_id, "clip-1", "sad", 1.0)
        with pytest.raises(WrongState, match=f"cannot learn from corrections.*{why}"):
            person.question(student_id, 1.0)


def test_contradictory_corrections_are_weighed() -> None:
    person = Rig().person()
    asked = clips(30)[5]
    person.correct("s", "clip-5", "happy", 1.0)
    happy = person.reading("s")
    both = person.correct("s", "clip-5", "sad", 2.0)
    assert happy is not None
    before_C, now_C = (each.local(asked.raw_C, asked.features) for each in (happy, both))
    assert now_C[1] < before_C[1] and now_C[2] > before_C[2], "the second counts as much as the first, and no more"
    again = person.correct("s", "clip-5", "sad", 3.0)
    assert again.local(asked.raw_C, asked.features)[2] > now_C[2]


def test_ten_thousand_corrections_are_bounded() -> None:
    rig = Rig()
    person = rig.person(0)
    person.begin("s", clips(MOST_CLIPS), in_use=())
    many = tuple(
        Correction(f"clip-{number % MOST_CLIPS}", CLASSES[number % 3], float(number), "s") for number in range(10_000)
    )
    rig.notes.remarks = Said(many[-MOST_KEPT:])
    reading = person.correct("s", "clip-7", "sad", 1e6)
    assert len(person.said().corrections) == MOST_KEPT and reading.corrections == MOST_USED
    assert reading.change_CE is not None and np.isfinite(reading.change_CE).all()


def test_corrections_that_are_all_of_one_class() -> None:
    person = Rig().person()
    window, before = rig_window(30), person.reading("s")
    assert before is not None
    for number in range(12):
        reading = person.correct("s", f"clip-{number}", "calm", float(number))
    before_NC, now_NC = (
        each.answers(window.features_MND, window.present_NM, window.raw_NC) for each in (before, reading)
    )
    assert now_NC[:12, 0].mean() > before_NC[:12, 0].mean() + 0.1
    assert reading.offset.prior_C.argmax() == 0
    assert reading.offset.prior_C.min() >= UNIFORM_SHARE / len(CLASSES) - 1e-9, "other classes stay possible"


def rig_window(count: int) -> Window:
    return Window.of(clips(count))


def test_corrected_clips_stay_when_others_leave_and_gone_ones_count_no_more() -> None:
    person = Rig().person()
    person.correct("s", "clip-0", "sad", 1.0)
    for number in range(MOST_CLIPS + 5):
        person.add("s", clip(f"new-{number}", 100 + number))
    with pytest.raises(InvalidInput, match="forgets older ones"):
        person.correct("s", "clip-1", "sad", 2.0)
    assert person.correct("s", "clip-0", "happy", 3.0).corrections == 2
    person.begin("t", [clip("clip-9", 9)], in_use=("s",))
    reading = person.reading("t")
    assert reading is not None and (reading.corrections, reading.offset.clips) == (0, 1), "another student, other clips"
    assert person.said().corrections[0].student_id == "s"


def test_the_window_slides_and_is_written_now_and_then() -> None:
    rig = Rig()
    person = rig.person()
    revision = person.revision
    for number in range(ESTIMATE_EVERY_CLIPS - 1):
        person.add("s", clip(f"new-{number}", number))
    assert person.revision == revision and len(rig.notes.windows["s"]) == 30
    person.add("s", clip("last", 99))
    assert person.revision > revision and len(rig.notes.windows["s"]) == 30 + ESTIMATE_EVERY_CLIPS
    rig.notes.full = True
    for number in range(2 * ESTIMATE_EVERY_CLIPS):
        person.add("s", clip(f"more-{number}", number))
    reading = person.reading("s")
    assert reading is not None and reading.offset.clips == 30 + 3 * ESTIMATE_EVERY_CLIPS, "a full disk stops no answer"


def test_questions_are_asked_of_whole_clips_alone_and_as_often_as_allowed() -> None:
    rig = Rig()
    person = rig.person(0)
    seen: Sequence[Seen] = (
        clip("voice", 1, picture=False),
        clip("face", 2, sound=False),
        clip("both", 3),
        clip("both too", 4),
    )
    person.begin("s", seen, in_use=())
    with pytest.raises(WrongState, match="0 questions a day are allowed"):
        person.question("s", 0.0, a_day=0)
    first = person.question("s", 0.0, a_day=2)
    assert first.clip.startswith("both") and sum(share for _, share in first.guesses) == pytest.approx(1, abs=1e-4)
    person.correct("s", first.clip, "sad", 1.0)
    second = person.question("s", 10.0)
    assert {first.clip, second.clip} == {"both", "both too"}
    with pytest.raises(WrongState, match=r"2 questions a day are allowed; the next is due in 24\.0 h"):
        person.question("s", 20.0)
    person.correct("s", second.clip, "sad", 30.0)
    with pytest.raises(WrongState, match="no clip with sound and picture"):
        person.question("s", 90_000.0)
    with pytest.raises(InvalidInput, match="questions a day"):
        person.question("s", 0.0, a_day=-3)


def test_a_person_whose_clips_are_all_alike_and_one_without_sound() -> None:
    person = Rig().person(0)
    person.begin("s", [replace(clip("x", 1), name=f"alike-{number}") for number in range(40)], in_use=())
    person.begin("t", [clip(f"face-{number}", number, sound=False) for number in range(40)], in_use=("s",))
    for student_id, agreement in (("s", True), ("t", False)):
        reading = person.reading(student_id)
        assert reading is not None and (reading.agreement is not None) == agreement
        assert np.isfinite(reading.offset.offset_MC).all()
        assert all(sentence.endswith((".", "(estimated).")) for sentence in person_facts(reading, CLASSES).sentences)
        for each in (clip("new", 5), clip("voice", 6, picture=False)):
            assert reading.local(each.raw_C, each.features).sum() == pytest.approx(1, abs=1e-5)
            assert reading.cloud(each.raw_C, each.features).sum() == pytest.approx(1, abs=1e-5)
    with pytest.raises(WrongState, match="no clip with sound and picture"):
        person.question("t", 0.0)
    person.begin("t", [clip(f"voice-{number}", number, picture=False) for number in range(40)], in_use=("s",))
    unseen = person.reading("t")
    assert unseen is not None and unseen.agreement is None
    assert unseen.offset.offset_MC[0].any() and not unseen.offset.offset_MC[1].any(), "nobody has seen this face"
    face = clip("face", 7, sound=False)
    assert unseen.local(face.raw_C, face.features).sum() == pytest.approx(1, abs=1e-5)


def test_the_state_folder_keeps_windows_and_corrections(tmp_path: Path) -> None:
    state = DeviceState(tmp_path)
    assert state.window("s") is None and state.said() == Said()
    person = Person(state, Slot())  # type: ignore[arg-type]
    person.begin("s", clips(20), in_use=())
    person.correct("s", "clip-1", "sad", 5.0)
    person.question("s", 6.0)
    again = Person(DeviceState(tmp_path), Slot())  # type: ignore[arg-type]
    assert same(person.reading("s"), again.reading("s"))
    assert again.said() == person.said() and again.said().asked_s == (6.0,)
    assert all(path.stat().st_mode & 0o77 == 0 for path in (tmp_path / "windows/s.npz", tmp_path / "corrections.json"))
    person.begin("t", clips(3), in_use=())
    assert sorted(path.name for path in (tmp_path / "windows").iterdir()) == ["t.npz"]


def test_deleted_clips_leave_windows_and_corrections(tmp_path: Path) -> None:
    state = DeviceState(tmp_path)
    person = Person(state, Slot())  # type: ignore[arg-type]
    person.begin("s", clips(5), in_use=())
    for number in (1, 2):
        person.correct("s", f"clip-{number}", "sad", float(number))
    person.add("s", clip("not written yet", 9))
    person.forget({"clip-1"})
    window, reading = state.window("s"), person.reading("s")
    assert window is not None and window.names == ("clip-0", "clip-2", "clip-3", "clip-4", "not written yet")
    assert reading is not None and (reading.corrections, reading.offset.clips) == (1, 5)
    assert [one.clip for one in state.said().corrections] == ["clip-2"]
    person.forget(None)
    assert state.window("s") is None and state.said().corrections == () and person.reading("s") is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x80\x04 a pickle", b"{}"])
def test_a_damaged_window_is_made_again(tmp_path: Path, content: bytes) -> None:
    state = DeviceState(tmp_path)
    state.save_window("s", rig_window(3))
    (tmp_path / "windows" / "s.npz").write_bytes(content)
    assert state.window("s") is None


def test_windows_of_other_sizes_are_refused() -> None:
    window = rig_window(4)
    read = Window.from_bytes(window.to_bytes())
    assert read.names == window.names and read.features_MND.tobytes() == window.features_MND.tobytes()
    for broken in (
        replace(window, raw_NC=window.raw_NC[:3]),
        replace(window, features_MND=window.features_MND * np.nan),
        replace(window, present_NM=window.present_NM * 0),
        replace(window, names=("a",) * 4),
    ):
        with pytest.raises(ValueError, match="damaged"):
            Window.from_bytes(broken.to_bytes())
    with pytest.raises(ValueError, match="another student"):
        understand("s", CENTRED, replace(window, features_MND=window.features_MND[:, :, :2]))
    with pytest.raises(ValueError, match="needs a clip"):
        Window.of(())


@pytest.mark.parametrize(
    "text", ['{"corrections": 3}', '{"corrections": [{"clip": 1}], "questions_a_day": 1, "asked_s": []}', "[]", "{"]
)
def test_damaged_corrections_are_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / "corrections.json").write_text(text)
    with pytest.raises(Corrupt, match=r"corrections.json cannot be read"):
        DeviceState(tmp_path).said()
