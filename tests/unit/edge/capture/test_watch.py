"""A frozen picture is noticed within 2 s, an unplugged camera within 5 s, and a clip is cut at the right samples."""

import numpy as np
import pytest

from isthmus.edge.capture import watch
from isthmus.edge.capture.assembly import Block, StampedPicture, pictures_of, sound_of
from isthmus.edge.capture.watch import Health, Seen, came, camera_health, microphone_health


def noticed_after(digests: list[int], then: str, wanted: Health) -> float:
    """Feed ten pictures a second, then freeze or stop; return the seconds until the camera's health is ``wanted``."""
    seen, now_s = Seen(0.0), 0.0
    for digest in digests:
        now_s += 0.1
        seen = came(seen, now_s, digest)
        assert camera_health(seen, now_s) is Health.WELL
    began_s = now_s
    while camera_health(seen, now_s) is not wanted:
        now_s += 0.1
        if then == "freezes":
            seen = came(seen, now_s, digests[-1])
        assert now_s < began_s + 60
    return now_s - began_s


def test_a_frozen_picture_is_noticed_within_2_s() -> None:
    assert noticed_after([1, 2, 3, 4], "freezes", Health.FROZEN) <= 2.0


def test_an_unplugged_camera_is_noticed_within_5_s() -> None:
    assert noticed_after([1, 2, 3, 4], "stops", Health.GONE) <= 5.0


def test_a_camera_has_time_to_open_and_is_then_gone() -> None:
    assert camera_health(Seen(100.0), 105.0) is Health.OPENING
    assert camera_health(Seen(100.0), 100.0 + watch.OPENING_S) is Health.GONE


def test_two_equal_pictures_in_a_row_are_not_yet_frozen() -> None:
    seen = came(came(came(Seen(0.0), 1.0, 5), 1.1, 5), 1.2, 6)
    assert camera_health(seen, 1.2) is Health.WELL


def test_a_microphone_of_zeros_is_muted_and_a_quiet_one_is_not() -> None:
    zeros, quiet = Seen(0.0), Seen(0.0)
    for number in range(1, 130):
        zeros, quiet = came(zeros, number / 10, 0), came(quiet, number / 10, number)
    assert microphone_health(zeros, 12.9) is Health.MUTED
    assert microphone_health(quiet, 12.9) is Health.WELL
    assert microphone_health(quiet, 17.0) is Health.GONE
    assert microphone_health(Seen(0.0), 1.0) is Health.OPENING


def blocks(start_s: float, seconds: float, *, rate_hz: int = 1_000, drift: float = 0.0) -> list[Block]:
    """Return blocks of 0.1 s whose samples say their own time, of a sound card whose clock runs fast by ``drift``."""
    found = []
    for number in range(round(seconds * 10)):
        at_s = start_s + number * 0.1 / (1 + drift)
        found.append(Block(at_s, rate_hz, (at_s + np.arange(rate_hz // 10) / rate_hz).astype(np.float32)))
    return found


def test_sound_is_cut_at_its_sample() -> None:
    cut_T = sound_of(blocks(10.0, 5.0), 11.25, 13.25)
    assert cut_T is not None and len(cut_T) == 2_000
    assert cut_T[0] == pytest.approx(11.25, abs=2e-3)
    assert cut_T[-1] == pytest.approx(13.249, abs=2e-3)


@pytest.mark.parametrize("hour_s", [0.0, 1_800.0, 3_600.0])
@pytest.mark.parametrize("drift", [-2e-4, 2e-4])
def test_a_drifting_sound_card_stays_within_40_ms_for_an_hour(hour_s: float, drift: float) -> None:
    """The stamps follow the device's clock; only the samples within a clip are counted."""
    cut_T = sound_of(blocks(hour_s, 5.0, drift=drift), hour_s + 1.0, hour_s + 4.0)
    assert cut_T is not None
    skew_s = np.abs(cut_T.astype(np.float64) - (hour_s + 1.0 + np.arange(3_000) / 1_000))
    assert skew_s.max() < 0.040


def test_missing_blocks_are_silence_and_too_many_are_no_sound() -> None:
    some = blocks(1.0, 3.0)
    gap_T = sound_of([*some[:10], *some[13:]], 1.0, 4.0)
    assert gap_T is not None and (gap_T[1_000:1_300] == 0).all() and gap_T[1_400] == pytest.approx(2.4, abs=2e-3)
    assert sound_of(some[:20], 1.0, 4.0) is None
    assert sound_of([], 1.0, 4.0) is None


def test_jittering_stamps_make_no_gaps() -> None:
    rng = np.random.default_rng(0)
    jittered = [Block(each.at_s + rng.uniform(0, 0.02), each.rate_hz, each.samples_T) for each in blocks(1.0, 3.0)]
    cut_T = sound_of(jittered, 1.1, 3.9)
    assert cut_T is not None and (cut_T > 0).all()
    assert (np.diff(cut_T) >= 0).all()


def test_pictures_are_those_of_the_clip() -> None:
    stamped = [StampedPicture(number / 10, np.full((2, 2, 3), number, np.uint8)) for number in range(50)]
    found = pictures_of(stamped, 1.0, 2.0)
    assert found is not None and [each[0, 0, 0] for each in found] == list(range(10, 20))
    assert pictures_of(stamped[:12], 1.0, 2.0) is None
