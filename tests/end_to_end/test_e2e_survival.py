"""Processes die; streams go on with the same tokens."""

import signal
import time

import psutil
import pytest

from conftest import Launch
from server import Server, kill

PROMPT = "Once upon a time"


@pytest.mark.parametrize("num_shard", [1, 2])
def test_a_stream_survives_a_dead_shard(launch: Launch, num_shard: int) -> None:
    with launch("--num-shard", str(num_shard)) as server:
        parameters = {"max_new_tokens": 300}
        undisturbed = server.generate(PROMPT, **parameters)
        sampled = server.generate(PROMPT, **parameters, seed=7, do_sample=True, repetition_penalty=1.2)
        for expected, extra in (
            (undisturbed, {}),
            (sampled, {"seed": 7, "do_sample": True, "repetition_penalty": 1.2}),
        ):
            stream = server.stream(PROMPT, **parameters, **extra)
            events = [next(stream) for _ in range(8)]
            kill(server.shard_pids[-1])
            events.extend(stream)
            assert [event["token"]["id"] for event in events] == [
                token["id"] for token in expected["details"]["tokens"]
            ]
            assert events[-1]["generated_text"] == expected["generated_text"]
            server.wait_until_healthy()
        assert server.metric("tgi_recoveries") == 2
        server.wait_for_metric("tgi_kv_blocks_used", 0)


def test_processes_that_stand_by_take_over(launch: Launch) -> None:
    with launch("--num-shard", "2") as server:
        expected = server.generate(PROMPT, max_new_tokens=300)
        deadline = time.monotonic() + 60
        while len(standbys := server.standby_pids) < 2:
            assert time.monotonic() < deadline, server.log()
            time.sleep(0.1)
        stream = server.stream(PROMPT, max_new_tokens=300)
        events = [next(stream) for _ in range(8)]
        kill(server.shard_pids[0])
        events.extend(stream)
        assert server.shard_pids == standbys
        assert events[-1]["generated_text"] == expected["generated_text"]
        assert [event["token"]["id"] for event in events] == [
            token["id"] for token in expected["details"]["tokens"]
        ]


def test_a_killed_router_comes_back(launch: Launch) -> None:
    with launch() as server:
        before = server.text(PROMPT, max_new_tokens=20)
        shard_pids, router_pid = server.shard_pids, server.router_pid
        kill(router_pid)
        psutil.wait_procs([psutil.Process(router_pid)] if psutil.pid_exists(router_pid) else [], timeout=10)
        server.wait_until_healthy()
        assert server.shard_pids == shard_pids
        assert server.router_pid != router_pid
        assert server.text(PROMPT, max_new_tokens=20) == before


def test_a_killed_launcher_leaves_no_orphan(launch: Launch) -> None:
    with launch("--num-shard", "2") as server:
        family = server.family()
        assert len(family) >= 4  # launcher, two shards, router
        kill(server.process.pid)
        server.process.wait()
        _, alive = psutil.wait_procs(family[1:], timeout=10)
        assert not alive


def test_sigterm_finishes_open_streams(launch: Launch) -> None:
    with launch() as server:
        expected = server.text(PROMPT, max_new_tokens=200)
        stream = server.stream(PROMPT, max_new_tokens=200)
        events = [next(stream)]
        server.process.send_signal(signal.SIGTERM)
        events.extend(stream)
        assert events[-1]["generated_text"] == expected
        assert server.process.wait(30) == 0


def test_too_many_deaths_end_the_server(launch: Launch) -> None:
    with launch("--max-restarts", "1") as server:
        kill(server.shard_pids[0])
        wait_for_restart(server)
        kill(server.shard_pids[0])
        assert server.process.wait(60) == 1
        assert "ShardFailed" in server.log()


def wait_for_restart(server: Server) -> None:
    deadline = time.monotonic() + 60
    while server.metric("tgi_recoveries") < 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    server.wait_until_healthy()
