"""Real launchers with stand-ins for the router and the shards: who starts when, what survives what."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from stand_ins import Launched, eventually, free_port, is_running, launched, make_environment

Launch = Callable[..., AbstractContextManager[Launched]]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture
def launch(python: Path, tmp_path: Path) -> Launch:
    def launch(*arguments: str, folder: str = "run", **rest: Any) -> AbstractContextManager[Launched]:
        return launched(python, tmp_path / folder, *arguments, **rest)

    return launch


def in_order(log: str, *messages: str) -> bool:
    places = [log.find(message) for message in messages]
    return -1 not in places and places == sorted(places)


def test_starts_download_then_shards_then_router_and_ends_them_in_reverse(launch: Launch) -> None:
    with launch("--num-shard", "2") as server:
        server.until_serving()
        first, second = server.notes("shard")
        (router,) = server.notes("router")
        model = str(server.folder / "model")
        assert server.stop() == 0
        assert in_order(
            server.log,
            "Args {",
            "Sharding model on 2 processes",
            "Default `max_batch_prefill_tokens` to 512",
            f"download: text_generation_launcher: Starting check and download process for {model}",
            "download: text_generation_launcher: Download file: model.safetensors",
            f"Successfully downloaded weights for {model}",
            "INFO shard-manager: text_generation_launcher: Starting shard rank=0",
            "Starting shard rank=1",
            "Shard ready in",
            "INFO text_generation_launcher: Starting Webserver",
            "\nthe router's own line, verbatim\n",
            "INFO text_generation_launcher: Webserver ready in",
            "Terminating webserver",
            "Waiting for webserver to gracefully shutdown",
            "webserver terminated",
            "Shutting down shards",
            "Terminating shard",
            "Waiting for shard to gracefully shutdown",
            "shard terminated",
        )
        assert "noise" not in server.log
        assert server.stderr == ""
        assert {first["rank"], second["rank"]} == {0, 1}
        assert first["env"]["MASTER_PORT"] == second["env"]["MASTER_PORT"]
        assert "--sharded" in first["argv"]
        assert first["argv"][:2] == ["serve", model]
        assert router["argv"][router["argv"].index("--tokenizer-name") + 1] == model
        (router_end,) = server.notes("router-ended")
        assert all(shard["time"] >= router_end["time"] for shard in server.notes("shard-ended"))
        assert len(server.notes("shard-ended")) == 2
        assert not any(map(is_running, server.everybody()))
        assert not server.socket_path().exists()


def test_a_dead_shard_costs_a_new_group_and_the_router_does_not_notice(launch: Launch) -> None:
    with launch("--num-shard", "2") as server:
        server.until_serving()
        before = server.pids("shard")
        (rank_1,) = [note["pid"] for note in server.notes("shard") if note["rank"] == 1]
        os.kill(rank_1, signal.SIGKILL)
        eventually(lambda: len(server.pids("shard")) == 4 and server.log.count("Shard ready in") == 4)
        assert not any(map(is_running, before))
        assert all(map(is_running, server.pids("shard")[2:]))
        (router,) = server.pids("router")
        assert is_running(router)
        assert in_order(
            server.log,
            "Shard process was signaled to shutdown with signal 9",
            "Shard 1 crashed",
            "Restarting the shards at once (1 of 10 in a row)",
        )
        ports = {(note["argv"][3], note["env"]["RANK"]) for note in server.notes("shard")}
        assert len(ports) == 2  # the same sockets for each rank: the router need not be told
        assert server.stop() == 0


def test_a_dead_router_is_replaced_and_the_shards_go_on(launch: Launch) -> None:
    with launch() as server:
        server.until_serving()
        (first,) = server.pids("router")
        os.kill(first, signal.SIGKILL)
        server.until_serving(num_starts=2)
        assert len(server.pids("router")) == 2
        assert "Webserver Crashed" in server.log
        assert len(server.pids("shard")) == 1
        assert is_running(server.pids("shard")[0])
        assert server.stop(signal.SIGINT) == 0


def test_router_and_shards_may_die_at_the_same_time(launch: Launch) -> None:
    with launch("--num-shard", "2") as server:
        server.until_serving()
        for pid in server.pids("router") + server.pids("shard"):
            os.kill(pid, signal.SIGKILL)
        server.until_serving(num_starts=2)
        eventually(lambda: server.log.count("Shard ready in") == 4)
        assert server.stop() == 0


def test_a_router_is_not_started_while_the_shards_are_away(launch: Launch) -> None:
    with launch() as server:
        server.until_serving()
        server.behave(load_s=1)
        os.kill(server.pids("shard")[0], signal.SIGKILL)
        eventually(lambda: "Shard 0 crashed" in server.log)
        os.kill(server.pids("router")[0], signal.SIGKILL)
        server.until_serving(num_starts=2)
        assert server.notes("router")[1]["time"] > server.notes("shard")[1]["time"] + 1
        assert server.stop() == 0


def test_gives_up_after_max_restarts_in_a_row(launch: Launch) -> None:
    with launch("--num-shard", "2", "--max-restarts", "2") as server:
        server.until_serving()
        server.behave(shards_that_fail=[0])  # from the first restart on
        (rank_0,) = [note["pid"] for note in server.notes("shard") if note["rank"] == 0]
        os.kill(rank_0, signal.SIGKILL)
        assert server.process.wait(30) == 1
        assert in_order(
            server.log,
            "Shard 0 crashed",
            "Restarting the shards at once (1 of 2 in a row)",
            "rank 0: no such tensor",
            "Shard 0 failed to start",
            "Restarting the shards in 0.25s (2 of 2 in a row)",
            "Giving up on the shards after 2 restarts in a row",
            "Terminating webserver",
            "Shutting down shards",
        )
        assert server.stderr.endswith("Error: ShardFailed\n")
        assert not any(map(is_running, server.everybody()))


def test_a_router_that_keeps_dying_ends_the_launcher(launch: Launch) -> None:
    with launch("--max-restarts", "0") as server:
        server.until_serving()
        os.kill(server.pids("router")[0], signal.SIGKILL)
        assert server.process.wait(30) == 1
        assert server.stderr.endswith("Error: WebserverFailed\n")
        assert not any(map(is_running, server.everybody()))


def test_a_shard_that_cannot_start_is_not_tried_again(launch: Launch) -> None:
    with launch("--num-shard", "2", shards_that_fail=[1]) as server:
        assert server.process.wait(30) == 1
        assert in_order(
            server.log,
            "Shard complete standard error output:\nrank 1: no such tensor\n",
            "Shard 1 failed to start",
            "Shutting down shards",
        )
        assert server.stderr == "Error: ShardCannotStart\n"
        assert len(server.pids("shard")) == 2
        assert server.pids("router") == []


def test_a_shard_that_dies_while_the_router_warms_up_is_not_tried_again(launch: Launch) -> None:
    with launch(shards_crash_after_s=0.5, warmup_s=5) as server:
        assert server.process.wait(30) == 1
        assert "CUDA error: out of patience" in server.log
        assert "Shard 0 crashed" in server.log
        assert server.stderr.endswith("Error: ShardFailed\n")
        assert len(server.pids("shard")) == 1


def test_a_router_that_cannot_start_is_not_tried_again(launch: Launch) -> None:
    with launch(router_fails=True) as server:
        assert server.process.wait(30) == 1
        assert "Webserver Crashed" in server.log
        assert server.stderr == "tokenizer is broken\nError: WebserverFailed\n"
        assert len(server.pids("router")) == 1


def test_a_port_that_another_server_holds_does_not_pass_for_ours(launch: Launch) -> None:
    with (
        launch(folder="first") as first,
        launch("--port", "0", folder="second", router_fails=True) as no_port,
    ):
        first.until_serving()
        assert no_port.process.wait(30) == 1
        with launch("--port", str(first.port), folder="third", warmup_s=0.5) as late:
            assert late.process.wait(30) == 1  # its router cannot bind
            assert len(late.pids("router")) == 1
            assert "Address already in use" in late.stderr


def test_a_failed_download_ends_the_launcher(launch: Launch) -> None:
    with launch(download_fails=True) as server:
        assert server.process.wait(30) == 1
        assert "Download encountered an error: no such repository" in server.log
        assert server.stderr == "Error: DownloadError\n"
        assert server.pids("shard") == []


@pytest.fixture
def may_hang_up() -> Iterator[None]:
    """Also where the tests themselves run under nohup: a process inherits what is ignored."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


@pytest.mark.usefixtures("may_hang_up")
@pytest.mark.parametrize(("slow", "started"), [("download_s", "download"), ("load_s", "shard")])
def test_may_be_stopped_before_it_serves(launch: Launch, slow: str, started: str) -> None:
    with launch(**{slow: 60}) as server:
        eventually(lambda: server.pids(started))
        assert server.stop(signal.SIGHUP) == 0
        assert server.stderr == ""
        assert ("Terminating download" if started == "download" else "Shutting down shards") in server.log
        assert not any(map(is_running, server.everybody()))


def test_what_does_not_end_in_time_is_killed(launch: Launch) -> None:
    with launch("-g", "1", router_ignores_sigterm=True, shards_ignore_sigterm=True) as server:
        server.until_serving()
        started = time.monotonic()
        assert server.stop() == 0
        assert 2 <= time.monotonic() - started < 30
        assert in_order(
            server.log, "Killing webserver", "webserver killed", "Shutting down shards", "shard killed"
        )


def test_a_second_signal_is_immediate(launch: Launch) -> None:
    with launch("--num-shard", "2", router_ignores_sigterm=True, shards_ignore_sigterm=True) as server:
        server.until_serving()
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: "Waiting for webserver to gracefully shutdown" in server.log)
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 20  # not the 90 s of grace
        assert not any(map(is_running, server.everybody()))


def test_nothing_outlives_a_killed_launcher(launch: Launch) -> None:
    with launch("--num-shard", "2", shards_ignore_sigterm=True, router_ignores_sigterm=True) as server:
        server.until_serving()
        everybody = server.everybody()
        assert len(everybody) == 6  # download, 2 shards, what each of them started, router
        path = server.socket_path()
        server.process.kill()
        server.process.wait()
        eventually(lambda: not any(map(is_running, everybody)), timeout_s=15)
        eventually(lambda: not path.exists(), timeout_s=15)


def test_children_die_with_the_launcher_even_without_its_sentinel(launch: Launch, tmp_path: Path) -> None:
    arguments = ("--num-shard", "2", "--shard-uds-path", str(tmp_path / "here"), "--no-standby-shards")
    with launch(*arguments, shards_ignore_sigterm=True, router_ignores_sigterm=True) as server:
        server.until_serving()
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        ours = server.pids("shard") + server.pids("router")
        (sentinel,) = set(map(int, children)) - set(ours)
        os.kill(sentinel, signal.SIGKILL)
        server.process.kill()
        server.process.wait()
        eventually(lambda: not any(map(is_running, ours)), timeout_s=15)
        for note in server.notes("shard"):
            os.kill(note["grandchild"], signal.SIGKILL)


def test_two_launchers_share_a_machine(launch: Launch) -> None:
    with launch(folder="first") as first, launch(folder="second") as second:
        first.until_serving()
        second.until_serving()
        assert first.socket_path() != second.socket_path()
        ports = [server.notes("shard")[0]["env"]["MASTER_PORT"] for server in (first, second)]
        assert ports[0] != ports[1]
        private = [path for path in (first.socket_path(), second.socket_path()) if path.name == "shard-0"]
        assert private  # at most one has /tmp/text-generation-server
        assert all(path.parent.stat().st_mode & 0o777 == 0o700 for path in private)
        assert first.stop() == 0
        assert second.answers()
        assert second.stop() == 0
        assert not any(path.parent.exists() for path in private)


def test_given_places_are_taken_as_given(launch: Launch, tmp_path: Path) -> None:
    port = free_port()
    stale = tmp_path / "here-0"
    subprocess.run(
        ["python3", "-c", f"import socket; socket.socket(socket.AF_UNIX).bind({str(stale)!r})"], check=True
    )
    with launch("--shard-uds-path", str(tmp_path / "here"), "--master-port", str(port)) as server:
        server.until_serving()
        assert server.socket_path() == stale
        assert server.notes("shard")[0]["env"]["MASTER_PORT"] == str(port)
        assert server.stop() == 0
        assert not stale.exists()


def test_a_descendant_that_holds_the_pipes_does_not_hide_a_shard_s_death(launch: Launch) -> None:
    with launch(escaping_grandchild=True) as server:
        server.until_serving()
        (shard,) = server.notes("shard")
        server.behave()
        os.kill(shard["pid"], signal.SIGKILL)
        eventually(lambda: len(server.pids("shard")) == 2)
        assert is_running(shard["hidden"])
        os.kill(shard["hidden"], signal.SIGKILL)
        assert not is_running(shard["grandchild"])
        assert server.stop() == 0


def test_logs_are_json_on_request_and_long_lines_come_whole(launch: Launch) -> None:
    with launch("--json-output", long_line=200_000) as server:
        server.until_serving()
        assert server.stop() == 0
        ours = [line for line in server.log.splitlines() if not line.startswith("the router's")]
        records = [json.loads(line) for line in ours]
        (loads,) = [record for record in records if record["fields"]["message"] == "shard 0 loads"]
        assert loads["level"] == "INFO"
        assert loads["target"] == "text_generation_launcher"
        assert loads["span"] == {"rank": 0, "name": "shard-manager"}
        assert loads["spans"] == [loads["span"]]
        assert any(record["fields"]["message"] == "x" * 200_000 for record in records)


def test_log_level_reaches_the_shards_and_debug_shows_their_noise(launch: Launch) -> None:
    with launch(env={"LOG_LEVEL": "debug"}) as server:
        server.until_serving()
        assert server.stop() == 0
        assert "\nnoise that is no JSON\n" in server.log
        (shard,) = server.notes("shard")
        assert shard["argv"][shard["argv"].index("--logger-level") + 1] == "DEBUG"
        assert "LOG_LEVEL" not in shard["env"]
        assert server.notes("router")[0]["env"]["LOG_LEVEL"] == "debug"


def test_the_api_key_is_neither_logged_nor_on_a_command_line(launch: Launch) -> None:
    with launch("--api-key", "open sesame") as server:
        server.until_serving()
        (router,) = server.notes("router")
        assert router["env"]["API_KEY"] == "open sesame"
        assert "open sesame" not in " ".join(router["argv"])
        assert server.stop() == 0
        assert "open sesame" not in server.log + server.stderr


def test_goes_on_serving_when_nobody_reads_its_logs(launch: Launch, python: Path, tmp_path: Path) -> None:
    with launch() as server:  # for its folder and its stand-ins
        server.until_serving()
        server.stop()
        environ = os.environ | {"STAND_IN_DIR": str(server.folder)}
        command = [python, "-m", "tgi_launcher.main", "--model-id", str(server.folder / "model")]
        process = subprocess.Popen(
            [*command, "--port", str(server.port), "--hostname", "127.0.0.1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environ,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        eventually(server.answers)
        process.terminate()
        assert process.wait(30) == 0
        assert process.stderr.read() == b""
        process.stderr.close()


def test_executables_that_are_nowhere_are_named(tmp_path: Path) -> None:
    python = make_environment(tmp_path / "environment")
    for name, exit_name in (("router", "WebserverCannotStart"), ("server", "DownloadError")):
        (tmp_path / "environment" / "bin" / f"text-generation-{name}").unlink()
        with launched(python, tmp_path / name, env={"PATH": "/usr/bin:/bin"}) as server:
            assert server.process.wait(30) == 1
            assert f"text-generation-{name} not found in PATH" in server.log
            assert f"Please install it with `make install-{name}`" in server.log
            assert server.stderr == f"Error: {exit_name}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "stderr"),
    [
        (["--validation-workers", "0"], 1, 'Error: ArgumentValidation("`validation_workers` must be > 0")\n'),
        (["--sharded", "true"], 101, "Error: UnknownDeviceCount"),
        (["--no-such-option"], 2, "No such option"),
        (["--version"], 0, ""),
    ],
)
def test_exit_codes(launch: Launch, arguments: list[str], code: int, stderr: str) -> None:
    with launch(*arguments) as server:
        assert server.process.wait(30) == code
        assert stderr in server.stderr
        if arguments == ["--version"]:
            assert re.fullmatch(r"text-generation-launcher \d+\.\d+\.\d+\n", server.log)
