"""The form of the log: lines of text or of JSON, on standard error."""

import json
import logging
import time
from typing import Literal

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _JSONLines(logging.Formatter):
    """A line of JSON for each record. What a record's `facts` are becomes fields of it."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage() if not hasattr(record, "facts") else "turn",
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up_logs(kind: Literal["text", "json"]) -> None:
    """Log to standard error from now on, in lines of text or JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JSONLines() if kind == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
