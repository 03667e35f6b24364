"""Log lines on stdout: JSON objects that the launcher reads, or text for people.

The JSON form is the one that TGI's launcher parses: {"text": ..., "record": {"level": {"name": ...}, ...}}.
stderr is left to what kills the process: the launcher shows it when the process has failed.
"""

import json
import logging
import sys
from datetime import UTC, datetime

LEVELS = {
    "TRACE": logging.DEBUG,  # the launcher's deepest level, which Python's logging lacks
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "SUCCESS": logging.INFO,
    "WARN": logging.WARNING,
    "WARNING": logging.WARNING,
    "ERROR": logging.ERROR,
    "CRITICAL": logging.CRITICAL,
}


def configure(level: str, *, json_output: bool) -> None:
    """Send the log records of this process, Python warnings included, to stdout.

    level: a key of LEVELS, in any case; it holds for our own modules. Libraries speak up from WARNING on.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_JsonLines() if json_output else _Text())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("tgi_shard").setLevel(LEVELS[level.upper()])
    logging.captureWarnings(True)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{_time(record)} {record.levelname:>7} {record.name}: {super().format(record)}"


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "text": super().format(record),  # message, and the traceback if there is one
            "record": {
                "level": {"name": record.levelname, "no": record.levelno},
                "message": record.getMessage(),
                "name": record.name,
                "process": record.process,
                "time": {"repr": _time(record), "timestamp": record.created},
            },
        }
        return json.dumps(line, ensure_ascii=False)


def _time(record: logging.LogRecord) -> str:
    """RFC 3339 in UTC, as the launcher and the router write it."""
    return (
        datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    )
