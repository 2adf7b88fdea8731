"""Addresses that the server prints are those that clients take."""

import pytest

from isthmus.cloud.settings import is_loopback, joined, split_listen


@pytest.mark.parametrize(("host", "address"), [("127.0.0.1", "127.0.0.1:5"), ("::1", "[::1]:5"), ("a.org", "a.org:5")])
def test_what_is_shown_can_be_split_again(host: str, address: str) -> None:
    assert joined(host, 5) == address
    assert split_listen(address) == (host, 5)


@pytest.mark.parametrize("wrong", ["", "5", "host", "host:", ":5", "host:x", "host:-1"])
def test_what_is_no_address_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        split_listen(wrong)


def test_only_this_machine_is_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org")))
