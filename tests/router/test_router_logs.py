"""Log lines: the levels of LOG_LEVEL, and one JSON object a line in a process of its own."""

import json
import logging
import subprocess
import sys

import pytest

from tgi_router import logs

SCRIPT = """
import logging, sys, structlog
from tgi_router import logs
level, form = sys.argv[1:]
logs.configure(logs.level_from(level), json_output=form == "json", colors=form == "colors")
log = structlog.get_logger("tgi_router.generation")
log.debug("detail")
log.info("Success", seed=None, total_time="1ms", text="é")
logging.getLogger("library").warning("from %s", "outside")
logging.getLogger("library").info("chatter")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("broke")
"""


def lines(level: str, form: str) -> list[str]:
    command = [sys.executable, "-c", SCRIPT, level, form]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize(
    ("expression", "level"),
    [
        ("info", logging.INFO),
        ("", logging.INFO),
        ("WARN", logging.WARNING),
        ("debug", logging.DEBUG),
        ("nonsense", logging.INFO),
        ("info,text_generation_router=debug", logging.DEBUG),
        ("text_generation_router=debug,warn", logging.DEBUG),
        ("warn,text_generation_launcher=debug", logging.WARNING),
        ("info,text_generation_router::server=warn", logging.WARNING),
    ],
)
def test_levels(expression: str, level: int) -> None:
    assert logs.level_from(expression) == level


def test_json_lines() -> None:
    success, library, broke = (json.loads(line) for line in lines("info", "json"))
    assert list(success)[:6] == ["timestamp", "level", "message", "target", "filename", "line_number"]
    assert (success["level"], success["message"], success["total_time"]) == ("INFO", "Success", "1ms")
    assert (success["seed"], success["text"], success["target"]) == (None, "é", "tgi_router.generation")
    assert success["timestamp"].endswith("Z")
    assert (library["level"], library["message"], library["target"]) == ("WARN", "from outside", "library")
    assert broke["level"] == "ERROR"
    assert "ZeroDivisionError" in broke["message"]


def test_text_lines() -> None:
    text = lines("debug", "text")
    assert " DEBUG tgi_router.generation: " in text[0]
    assert text[1].endswith(": Success total_time=1ms text=é")
    assert text[-1] == "ZeroDivisionError: division by zero"
    assert "\x1b[32mINFO\x1b[0m" in lines("info", "colors")[0]
    assert lines("off", "text") == []
