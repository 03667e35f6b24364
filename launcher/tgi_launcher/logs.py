"""What the launcher writes to stdout: its own lines and those of its children, as text or as JSON."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any, TextIO

TARGET = "text_generation_launcher"
MAX_LINE_BYTES = 1 << 20  # a longer line is passed on in pieces, so that a child cannot fill our memory
MAX_TAIL_BYTES = 1 << 16


class Level(IntEnum):
    DEBUG = 10
    INFO = 20
    WARN = 30
    ERROR = 40
    OFF = 50


_LEVELS = {
    "TRACE": Level.DEBUG,
    "DEBUG": Level.DEBUG,
    "INFO": Level.INFO,
    "SUCCESS": Level.INFO,
    "WARN": Level.WARN,
    "WARNING": Level.WARN,
    "ERROR": Level.ERROR,
    "CRITICAL": Level.ERROR,
    "OFF": Level.OFF,
}


def level_from(expression: str | None) -> Level:
    """The launcher's level in LOG_LEVEL: a level, or a filter such as `info,text_generation_router=debug`."""
    level = Level.INFO
    for directive in (expression or "").split(","):
        target, _, name = directive.strip().rpartition("=")
        if target in ("", TARGET):
            level = _LEVELS.get(name.strip().upper(), level)
    return level


@dataclass(frozen=True, slots=True)
class Span:
    """What a line is about: `shard-manager`, rank 0."""

    name: str
    fields: Mapping[str, int | str] = field(default_factory=dict)


class Log:
    def __init__(self, out: TextIO, level: Level = Level.INFO, json_output: bool = False) -> None:
        self.out: TextIO | None = out
        self.level = level
        self.json_output = json_output

    def debug(self, message: str, span: Span | None = None) -> None:
        self.emit(Level.DEBUG, message, span)

    def info(self, message: str, span: Span | None = None) -> None:
        self.emit(Level.INFO, message, span)

    def warn(self, message: str, span: Span | None = None) -> None:
        self.emit(Level.WARN, message, span)

    def error(self, message: str, span: Span | None = None) -> None:
        self.emit(Level.ERROR, message, span)

    def emit(self, level: Level, message: str, span: Span | None = None) -> None:
        if level < self.level:
            return
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        write = _as_json if self.json_output else _as_text
        self._write(write(now, level, message, span))

    def raw(self, line: bytes) -> None:
        """Copy a child's line as it is."""
        self._write(line.decode(errors="replace"))

    def _write(self, line: str) -> None:
        if self.out is None:
            return
        try:
            self.out.write(line + "\n")
            self.out.flush()
        except BrokenPipeError:
            # Whoever read the logs has gone; the server's clients have not. What stays in the stream's buffer
            # goes to /dev/null, or the interpreter would complain about it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.out.fileno())
            self.out = None


def _as_text(now: str, level: Level, message: str, span: Span | None) -> str:
    where = f"{span.name}: {TARGET}" if span else TARGET
    fields = "".join(f" {name}={value}" for name, value in (span.fields if span else {}).items())
    return f"{now} {level.name:>5} {where}: {message}{fields}"


def _as_json(now: str, level: Level, message: str, span: Span | None) -> str:
    record: dict[str, Any] = {
        "timestamp": now,
        "level": level.name,
        "fields": {"message": message},
        "target": TARGET,
    }
    if span:
        record["span"] = {**span.fields, "name": span.name}
        record["spans"] = [record["span"]]
    return json.dumps(record, ensure_ascii=False)


def parse_child_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object on a line that a shard or the download step printed; None if it is anything else."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def relay(log: Log, line: bytes, record: dict[str, Any] | None, span: Span) -> None:
    """Re-emit a child's line: a log record at its level; anything else only at DEBUG, as it is."""
    match record:
        case {"text": str(text), "record": {"level": {"name": str(name)}}} if name.upper() in _LEVELS:
            log.emit(_LEVELS[name.upper()], text.rstrip("\n"), span)
        case _:
            if log.level <= Level.DEBUG:
                log.raw(line)


class Lines:
    """Cuts a stream of bytes into lines, however the reads fall."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that `chunk` completes, without their newline."""
        self._rest += chunk
        if b"\n" not in chunk:
            return self.end() if len(self._rest) > MAX_LINE_BYTES else []
        *lines, rest = bytes(self._rest).split(b"\n")
        self._rest = bytearray(rest)
        return lines

    def end(self) -> list[bytes]:
        """What is left when the stream ends without a newline."""
        rest, self._rest = bytes(self._rest), bytearray()
        return [rest] if rest else []


class Tail:
    """The last bytes of a child's stderr, kept for the report on its death."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, chunk: bytes) -> None:
        self._bytes += chunk
        if len(self._bytes) > 2 * MAX_TAIL_BYTES:  # cut now and then, not at every read
            del self._bytes[:-MAX_TAIL_BYTES]

    def text(self) -> str:
        return self._bytes[-MAX_TAIL_BYTES:].decode(errors="replace")
