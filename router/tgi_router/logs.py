"""Log lines on stdout: text for people, or one JSON object a line."""

import json
import logging
import sys
from collections.abc import Mapping
from typing import Any

import structlog
from structlog.processors import CallsiteParameter, CallsiteParameterAdder
from structlog.typing import EventDict, WrappedLogger

TARGETS = ("text_generation_router", "tgi_router")  # the names that a LOG_LEVEL filter may call us by
LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL,  # which we never use
}
_COLORS = {"DEBUG": "\x1b[34m", "INFO": "\x1b[32m", "WARN": "\x1b[33m", "ERROR": "\x1b[31m"}
_PLACE = ("timestamp", "level", "event", "target", "filename", "lineno", "exception")


def level_from(expression: str) -> int:
    """Our level in a filter: "info", or "warn,text_generation_router=debug"; what is not understood is
    INFO.
    """
    level = logging.INFO
    own_level = None
    for directive in expression.split(","):
        target, _, name = directive.strip().rpartition("=")
        if name.lower() not in LEVELS:
            continue
        if target.split("::")[0] in TARGETS:
            own_level = LEVELS[name.lower()]
        elif not target:
            level = LEVELS[name.lower()]
    return level if own_level is None else own_level


def configure(level: int, *, json_output: bool, colors: bool) -> None:
    """For the whole process, libraries included; they speak up from WARNING on."""
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            CallsiteParameterAdder([CallsiteParameter.FILENAME, CallsiteParameter.LINENO]),
            structlog.processors.format_exc_info,
            _as_json if json_output else (_as_colored_text if colors else _as_text),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers = [_Library()]
    root.setLevel(max(level, logging.WARNING))
    logging.captureWarnings(True)


class _Logger(structlog.PrintLogger):
    def __init__(self, target: str) -> None:
        super().__init__(sys.stdout)
        self.target = target


class _LoggerFactory:
    def __call__(self, *args: Any) -> _Logger:
        return _Logger(str(args[0]) if args else "tgi_router")


class _Library(logging.Handler):
    """What libraries log comes out like our own lines."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = structlog.get_logger(record.name)
        logger.log(record.levelno, record.getMessage(), exc_info=record.exc_info)


def _level(event: Mapping[str, Any]) -> str:
    name = str(event["level"]).upper()
    return {"WARNING": "WARN", "CRITICAL": "ERROR"}.get(name, name)


def _fields(event: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key not in _PLACE}


def _as_json(logger: WrappedLogger, _: str, event: EventDict) -> str:
    message = str(event["event"])
    if "exception" in event:
        message += "\n" + event["exception"]
    line = {
        "timestamp": event["timestamp"],
        "level": _level(event),
        "message": message,
        "target": logger.target,
        "filename": event["filename"],
        "line_number": event["lineno"],
    }
    return json.dumps(line | _fields(event), ensure_ascii=False, default=str)


def _as_text(logger: WrappedLogger, _: str, event: EventDict) -> str:
    return _text(logger, event, _level(event))


def _as_colored_text(logger: WrappedLogger, _: str, event: EventDict) -> str:
    level = _level(event)
    return _text(logger, event, f"{_COLORS.get(level, '')}{level}\x1b[0m")


def _text(logger: WrappedLogger, event: EventDict, level: str) -> str:
    fields = "".join(f" {key}={value}" for key, value in _fields(event).items() if value is not None)
    line = (
        f"{event['timestamp']} {level:>5} {logger.target}: {event['filename']}:{event['lineno']}: "
        f"{event['event']}{fields}"
    )
    return f"{line}\n{event['exception']}" if "exception" in event else line
