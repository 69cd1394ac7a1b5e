"""Logs as JSON, one object per line. They never contain image contents, tokens or keys."""

import json
import logging
import sys
import time


class JsonLines(logging.Formatter):
    """Time (UTC), level, logger, message, traceback if there is one, and the members of ``extra={"fields": {...}}``."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(level: str) -> None:
    """Write log records to stderr as JSON: ours from ``level`` on, those of libraries and Python from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("cascade").setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it warns about every client that sends invalid HTTP


def say(name: str, text: str) -> None:
    """Write one warning to stderr from a process without logging; it is lost if stderr can't be written."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    handler.handle(logging.LogRecord(name, logging.WARNING, __file__, 0, text, None, None))
