"""JSON lines: each record one line that can be read back."""

import json
import logging
import re
import sys

from cascade.logs import JsonLines


def record(level: int = logging.INFO, message: str = "request", **rest: object) -> logging.LogRecord:
    made = logging.LogRecord("cascade.x", level, __file__, 1, message, None, None)
    made.__dict__ |= rest
    return made


def test_a_record_is_one_line_of_json() -> None:
    text = JsonLines().format(record(message="two\nlines \x1b[2J", fields={"request_id": "7", "status": 200}))
    assert "\n" not in text and "\x1b" not in text
    line = json.loads(text)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "info",
        "logger": "cascade.x",
        "message": "two\nlines \x1b[2J",
        "request_id": "7",
        "status": 200,
    }


def test_a_traceback_is_a_member() -> None:
    try:
        raise ZeroDivisionError("none")
    except ZeroDivisionError:
        text = JsonLines().format(record(logging.ERROR, exc_info=sys.exc_info()))
    assert "\n" not in text and json.loads(text)["traceback"].endswith("ZeroDivisionError: none")
