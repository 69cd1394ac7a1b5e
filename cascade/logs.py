"""Logs as JSON, one object a line. What images hold, tokens and keys are never in them."""

import json
import logging
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
