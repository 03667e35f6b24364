"""Processes that stand by: they take over from a lost group, and are never left behind, nor in the way."""

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from stand_ins import SPEAKING, Launched, eventually, is_running, launched, make_environment

Launch = Callable[..., AbstractContextManager[Launched]]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture
def launch(python: Path, tmp_path: Path) -> Launch:
    """Of shards that have run a step, so that others stand by soon."""

    def launch(*arguments: str, **rest: Any) -> AbstractContextManager[Launched]:
        return launched(python, tmp_path / "run", *arguments, **SPEAKING | rest)

    return launch


def until_one_stands_by_for_each(server: Launched, num_started: int) -> None:
    eventually(lambda: len(server.pids("standby")) >= num_started)


def test_they_take_over_from_a_lost_group_and_others_stand_by(launch: Launch) -> None:
    with launch("--num-shard", "2") as server:
        server.until_serving()
        until_one_stands_by_for_each(server, 2)
        first = server.notes("shard")
        waiting = {note["rank"]: note["pid"] for note in server.notes("standby")}
        assert set(waiting) == {0, 1}
        os.kill(first[1]["pid"], signal.SIGKILL)
        eventually(lambda: server.log.count("Shard ready in") == 4)
        second = server.notes("shard")[2:]
        assert {note["rank"]: note["pid"] for note in second} == waiting
        assert server.log.count("Starting shard in the process that stood by") == 2
        for note in second:
            assert note["argv"] == [*first[0]["argv"], "--standby"]
        until_one_stands_by_for_each(server, 4)
        for pid in server.pids("shard")[2:]:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: server.log.count("Shard ready in") == 6)
        assert set(server.pids("shard")[4:]) == set(server.pids("standby")[2:4])
        assert len(server.pids("router")) == 1
        assert server.stop() == 0
        assert server.stderr == ""
        assert not any(map(is_running, server.everybody()))


def test_they_get_the_port_of_the_start_in_which_they_take_part(launch: Launch) -> None:
    with launch("--num-shard", "2") as server:
        server.until_serving()
        until_one_stands_by_for_each(server, 2)
        os.kill(server.pids("shard")[0], signal.SIGKILL)
        eventually(lambda: server.log.count("Shard ready in") == 4)
        ports = {note["env"]["MASTER_PORT"] for note in server.notes("shard")[2:]}
        assert len(ports) == 1
        assert all(port not in ("", "0") for port in ports)


def test_one_that_still_imports_takes_over_when_it_has_done_so(launch: Launch) -> None:
    with launch(import_s=3) as server:
        server.until_serving()
        until_one_stands_by_for_each(server, 1)
        os.kill(server.pids("shard")[0], signal.SIGKILL)
        eventually(lambda: server.log.count("Shard ready in") == 2)
        assert server.pids("shard")[1] == server.pids("standby")[0]
        assert server.stop() == 0


def test_a_dead_one_disturbs_nobody_and_the_shard_starts_without_it(launch: Launch) -> None:
    with launch() as server:
        server.until_serving()
        until_one_stands_by_for_each(server, 1)
        (shard,), (standby,) = server.pids("shard"), server.pids("standby")
        os.kill(standby, signal.SIGKILL)
        eventually(lambda: not is_running(standby))
        assert is_running(shard)
        os.kill(shard, signal.SIGKILL)
        eventually(lambda: server.log.count("Shard ready in") == 2)
        assert server.log.count("stood by") == 0
        assert server.pids("shard")[1] != standby
        assert server.stop() == 0


def test_when_they_cannot_start_the_server_does_without(launch: Launch) -> None:
    with launch(standbys_fail=True) as server:
        server.until_serving()
        until_one_stands_by_for_each(server, 1)
        (standby,) = server.pids("standby")
        eventually(lambda: not is_running(standby))
        os.kill(server.pids("shard")[0], signal.SIGKILL)
        eventually(lambda: server.log.count("Shard ready in") == 2)
        assert "crashed" in server.log
        assert server.stop() == 0


def test_one_that_fails_as_a_shard_is_a_failed_start(launch: Launch) -> None:
    with launch("--max-restarts", "2") as server:
        server.until_serving()
        until_one_stands_by_for_each(server, 1)
        server.behave(**SPEAKING | {"shards_that_fail": [0]})
        os.kill(server.pids("shard")[0], signal.SIGKILL)
        assert server.process.wait(30) == 1
        assert server.log.count("Shard 0 failed to start") == 2
        assert server.pids("shard")[1] == server.pids("standby")[0]
        assert server.stderr.endswith("Error: ShardFailed\n")
        assert not any(map(is_running, server.everybody()))


@pytest.mark.parametrize("has_sentinel", [True, False])
def test_they_die_with_the_launcher(launch: Launch, has_sentinel: bool) -> None:
    with launch("--num-shard", "2", import_s=60) as server:  # they do not even listen
        server.until_serving()
        until_one_stands_by_for_each(server, 2)
        standbys = server.pids("standby")
        if not has_sentinel:
            file = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
            ours = server.pids("shard") + server.pids("router") + standbys
            (sentinel,) = set(map(int, file.read_text().split())) - set(ours)
            os.kill(sentinel, signal.SIGKILL)
        server.process.kill()
        server.process.wait()
        eventually(lambda: not any(map(is_running, standbys)), timeout_s=15)
        if not has_sentinel:
            for note in server.notes("shard"):
                os.kill(note["grandchild"], signal.SIGKILL)


def test_they_do_not_delay_a_stop(launch: Launch) -> None:
    with launch("--num-shard", "2", import_s=60) as server:
        server.until_serving()
        until_one_stands_by_for_each(server, 2)
        assert server.stop() == 0
        assert not any(map(is_running, server.everybody()))


@pytest.mark.parametrize("arguments", [["--no-standby-shards"], ["--max-restarts", "0"]])
def test_none_where_none_is_wanted_or_of_use(launch: Launch, arguments: list[str]) -> None:
    with launch(*arguments) as server:
        server.until_serving()
        os.kill(server.pids("shard")[0], signal.SIGKILL)
        if arguments[0] == "--no-standby-shards":
            eventually(lambda: server.log.count("Shard ready in") == 2)
            assert server.stop() == 0
        else:
            assert server.process.wait(30) == 1
        assert server.pids("standby") == []
