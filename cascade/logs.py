"""Logs as JSON, one object a line. What images hold, tokens and keys are never in them."""

import json
import logging
import sys
import time


class JsonLines(logging.Formatter):
    """time (UTC), level, logger, message, traceback if there is one, and the members of ``extra={"about": {...}}``."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "about", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def say(name: str, text: str) -> None:
    """One warning on stderr, of a process that has no logging of its own; lost where stderr can't be written."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    handler.handle(logging.LogRecord(name, logging.WARNING, __file__, 0, text, None, None))
