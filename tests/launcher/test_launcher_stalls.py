"""Processes that run and hang: told from busy ones, killed and replaced."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from stand_ins import SPEAKING, Launched, eventually, is_running, launched, make_environment

from tgi_launcher.stalls import Health, ShardWatch, Silence

Launch = Callable[..., AbstractContextManager[Launched]]

TIMEOUT_S = 2


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture
def launch(python: Path, tmp_path: Path) -> Launch:
    def launch(*arguments: str, **rest: Any) -> AbstractContextManager[Launched]:
        return launched(python, tmp_path / "run", "--stall-timeout", str(TIMEOUT_S), *arguments, **rest)

    return launch


# The rule


def test_a_shard_is_judged_by_the_longest_step_so_far() -> None:
    def judge(age_s: float, longest_step_s: float) -> bool:
        watch, now = ShardWatch(60), time.monotonic()
        health = Health(1, age_s, longest_step_s)
        watch.note(health, now)
        return watch.note(health, now + 1) is not None

    assert not judge(0, 0)
    assert not judge(59, 0)
    assert judge(61, 0)
    assert judge(61, 6)
    assert not judge(61, 7)
    assert judge(71, 7)


def test_a_step_must_look_too_old_twice_and_be_the_same() -> None:
    watch, now = ShardWatch(60), time.monotonic()
    assert watch.note(Health(1, 100, 0), now) is None
    assert watch.note(Health(2, 100, 0), now + 1) is None  # another one
    assert watch.note(Health(2, 1, 0), now + 2) is None
    assert watch.note(Health(2, 100, 0), now + 3) is None  # the count began anew
    assert watch.note(Health(2, 101, 0), now + 4) == "its step takes 101.0s, the limit is 60.0s"


def test_silence_ends_with_any_answer() -> None:
    silence, now = Silence(10), time.monotonic()
    for second in range(1, 9):
        assert silence.note(False, now + second) is None
    assert silence.note(True, now + 9) is None
    for second in range(10, 19):
        assert silence.note(False, now + second) is None
    assert silence.note(False, now + 19.5) == "no answer for 10.5s"


def test_a_pause_of_the_launcher_is_nobody_s_silence() -> None:
    silence, now = Silence(60), time.monotonic()
    assert silence.note(False, now + 3600) is None
    assert silence.note(False, now + 7200) is None


# Real launchers


def test_slow_is_not_hung_and_a_step_that_takes_too_long_is(launch: Launch) -> None:
    slow = {"last_step_id": 7, "current_step_age_s": 9.0, "longest_step_s": 1.0}
    with launch("--num-shard", "2", **SPEAKING | {"health": slow}) as server:
        server.until_serving()
        time.sleep(TIMEOUT_S + 1.5)
        assert len(server.pids("shard")) == 2
        assert "stalled" not in server.log
        server.behave(**SPEAKING | {"health": slow | {"current_step_age_s": 11.0}})
        eventually(lambda: "Shard 1 stalled" in server.log)
        server.behave(**SPEAKING)
        eventually(lambda: server.log.count("Shard ready in") == 4)
        for rank in (0, 1):
            assert f"Shard {rank} stalled: its step takes 11.0s, the limit is 10.0s" in server.log
        assert "Restarting the shards at once (1 of 10 in a row)" in server.log
        assert not any(map(is_running, server.pids("shard")[:2]))
        assert len(server.pids("router")) == 1  # its 503 is an answer too
        assert server.stop() == 0
        assert server.stderr == ""


def test_silent_shards_are_replaced(launch: Launch) -> None:
    with launch(router_answers=True) as server:
        server.until_serving()
        (silent,) = server.pids("shard")
        server.behave(**SPEAKING)
        eventually(lambda: "Shard 0 stalled: no answer for " in server.log)
        eventually(lambda: server.log.count("Shard ready in") == 2)
        time.sleep(TIMEOUT_S + 1.5)
        assert server.pids("shard")[0] == silent
        assert [is_running(pid) for pid in server.pids("shard")] == [False, True]
        assert len(server.pids("router")) == 1


def test_a_silent_router_is_replaced_and_the_shards_stay(launch: Launch) -> None:
    with launch(**SPEAKING | {"router_answers": False}) as server:
        server.until_serving()
        shards = server.pids("shard")
        server.behave(**SPEAKING)
        eventually(lambda: "Webserver stalled: no answer for " in server.log)
        server.until_serving(num_starts=2)
        time.sleep(TIMEOUT_S + 1.5)
        assert [is_running(pid) for pid in server.pids("router")] == [False, True]
        assert server.pids("shard") == shards
        assert all(map(is_running, shards))
