"""Log lines of the service are JSON and contain no secrets."""

import json
import logging

from isthmus.cloud.identity import Gate
from isthmus.cloud.logs import JsonLines
from isthmus.cloud.store.devices import Device


def test_a_line_is_one_json_object_with_its_traceback() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("isthmus.cloud", logging.ERROR, "file", 1, "job %s\nfailed", ("x",), info)
    text = JsonLines().format(record)
    line = json.loads(text)
    assert "\n" not in text
    assert (line["level"], line["logger"], line["message"]) == ("error", "isthmus.cloud", "job x\nfailed")
    assert "ValueError: two\nlines" in line["traceback"]


def test_what_is_secret_has_no_representation() -> None:
    assert "sesame" not in repr(Gate("sesame", 1))
    assert "qqq" not in repr(Device("dev", "kiosk", b"q" * 32, 1.0))
