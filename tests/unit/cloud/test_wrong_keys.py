"""Wrong enrolment keys are slowed down by address and do not fill the log."""

import pytest

from isthmus.cloud.wrong_keys import WrongKeys
from isthmus.proto.errors import Busy


def test_the_more_wrong_keys_the_longer_each_waits(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    keys = WrongKeys(lambda: now_s)
    waits = []
    for _ in range(40):
        keys.admit("host")
        waits.append(keys.begin("host"))
        keys.end("host")
    assert waits[:4] == [0.0, 0.0, 0.0, 0.25]
    assert waits == sorted(waits) and waits[-1] == 5.0
    assert keys.begin("other") == 0.0
    assert len([record for record in caplog.records if "from host" in record.message]) == 6
    now_s = 301.0
    assert keys.begin("host") == 0.0, "after five minutes it is forgotten"


def test_what_is_tried_in_parallel_is_not_even_compared() -> None:
    keys = WrongKeys(lambda: 0.0)
    for _ in range(16):
        keys.admit("host")
        keys.begin("host")
    with pytest.raises(Busy, match="your address"):
        keys.admit("host")
    keys.admit("other")
    keys.end("host")
    keys.admit("host")


def test_addresses_are_forgotten_beyond_a_bound() -> None:
    keys = WrongKeys(lambda: 0.0)
    for number in range(3_000):
        keys.begin(f"host {number}")
    assert len(keys._addresses) == 1_000
    keys.end("host 0")
