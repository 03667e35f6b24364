"""Processes that hang without dying are noticed, told of, and replaced."""

import os
import signal
import time
from collections.abc import Iterator

import httpx

from conftest import Launch
from server import Server

PROMPT = "Once upon a time"
STALL_TIMEOUT_S = 3
HEALTHY = ("ok", "busy")


def test_a_stream_survives_a_hung_shard(launch: Launch) -> None:
    with launch("--num-shard", "2", "--stall-timeout", str(STALL_TIMEOUT_S)) as server:
        parameters = {"max_new_tokens": 200, "seed": 7, "do_sample": True}
        undisturbed = server.generate(PROMPT, **parameters)
        assert health(server) == (200, "ok", b"")
        stream = server.stream(PROMPT, **parameters)
        events = [next(stream) for _ in range(8)]
        before = server.shard_pids
        os.kill(before[1], signal.SIGSTOP)  # rank 0 waits for it in the middle of a step
        stopped_at = time.monotonic()
        seen = set(states_until_healthy_again(server))
        assert time.monotonic() - stopped_at > STALL_TIMEOUT_S
        assert seen & {"stalled", "recovering"}
        assert seen <= {"stalled", "recovering"}
        events.extend(stream)
        assert [event["token"]["id"] for event in events] == [
            token["id"] for token in undisturbed["details"]["tokens"]
        ]
        assert events[-1]["generated_text"] == undisturbed["generated_text"]
        assert "Shard 1 stalled: no answer for " in server.log()
        assert not set(server.shard_pids) & set(before)
        assert server.metric("tgi_recoveries") == 1


def test_a_hung_router_is_replaced_and_a_draining_one_says_so(launch: Launch) -> None:
    with launch("--stall-timeout", str(STALL_TIMEOUT_S)) as server:
        before = server.text(PROMPT, max_new_tokens=20)
        shard_pids, router_pid = server.shard_pids, server.router_pid
        os.kill(router_pid, signal.SIGSTOP)
        server.client.close()  # its connection leads to the router that hangs
        server.client = httpx.Client(base_url=server.url, timeout=60)
        server.wait_until_healthy()
        assert server.router_pid != router_pid
        assert server.shard_pids == shard_pids
        assert "Webserver stalled: no answer for " in server.log()
        assert server.text(PROMPT, max_new_tokens=20) == before

        stream = server.stream(PROMPT, max_new_tokens=400)
        events = [next(stream)]
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while (told := health(server))[0] == 200:
            assert time.monotonic() < deadline
        assert told == (503, "draining", unhealthy_body("draining"))
        events.extend(stream)
        assert len(events) == 400
        assert server.process.wait(30) == 0


def health(server: Server) -> tuple[int, str, bytes]:
    response = server.client.get("/health")
    return response.status_code, response.headers["x-health-state"], response.content


def unhealthy_body(state: str) -> bytes:
    return f'{{"error":"unhealthy","error_type":"healthcheck","state":"{state}"}}'.encode()


def states_until_healthy_again(server: Server) -> Iterator[str]:
    """The states that /health tells from the first that is not 200, until it is 200 again."""
    deadline = time.monotonic() + 60
    is_ill = False
    while True:
        status, state, body = health(server)
        if status == 200:
            assert state in HEALTHY
            if is_ill:
                return
        else:
            is_ill = True
            assert (status, body) == (503, unhealthy_body(state))
            yield state
        assert time.monotonic() < deadline
        time.sleep(0.05)
