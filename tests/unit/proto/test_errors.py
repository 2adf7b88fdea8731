"""An error that crosses the wire as a status becomes the same error again."""

import pytest

from isthmus.proto import errors
from isthmus.proto.errors import Busy, Internal, IsthmusError, StorageFull, TooLarge, from_status

EVERY = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, IsthmusError)]


@pytest.mark.parametrize("error", [error for error in EVERY if error is not IsthmusError])
def test_every_error_is_known_again_by_its_name(error):
    again = from_status(error.code, "words", error.__name__)
    assert type(again) is error
    assert str(again) == "words"


def test_what_shares_a_code_differs_in_whether_a_retry_helps():
    assert {TooLarge.code} == {Busy.code} == {StorageFull.code}
    assert not from_status(8, "", "TooLarge").retryable
    assert from_status(8, "", "Busy").retryable


def test_a_status_without_a_name_is_grpcs_own():
    assert type(from_status(8, "CLIENT: Sent message larger than max (5 vs. 4)")) is TooLarge
    assert type(from_status(8, "Concurrent RPC limit exceeded!")) is Busy, "overload is no reason to give up"


def test_a_call_that_was_never_begun_may_be_asked_again():
    found = from_status(1, "CANCELLED")
    assert type(found) is errors.Unavailable and found.retryable and "before it began" in str(found)


@pytest.mark.parametrize(("code", "name"), [(16, "Busy"), (16, "IsthmusError"), (16, "Exception"), (16, "no such")])
def test_a_name_never_overrules_the_code(code, name):
    assert type(from_status(code, "", name)) is errors.Unauthenticated


@pytest.mark.parametrize(("pushback_ms", "seconds"), [("1500", 1.5), ("0", 0.0), ("999999999", 999_999.999)])
def test_a_busy_server_says_when_to_try_again(pushback_ms, seconds):
    assert from_status(8, "", "Busy", pushback_ms).retry_after_s == seconds


@pytest.mark.parametrize("pushback_ms", ["", "-1", "1.5", "soon", "9" * 5000, "\u0663", "1e3", "nan"])
def test_a_hint_that_is_no_number_of_milliseconds_is_no_hint(pushback_ms):
    assert from_status(8, "", "Busy", pushback_ms).retry_after_s is None
    assert type(from_status(14, "", "", pushback_ms)) is errors.Unavailable


def test_an_unknown_code_is_internal():
    assert type(from_status(99, "")) is Internal
