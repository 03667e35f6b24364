"""The command text-generation-server: what it accepts, what it says, what it prints last."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner, Result

import fake_hub
import tiny_models
from fake_hub import FakeHub
from server import free_port
from shard_process import ShardProcess
from tgi_shard import main as cli
from tgi_shard import service
from tgi_shard.settings import Settings

GROUP = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def server(checkpoint: Path) -> Iterator[FakeHub]:
    with fake_hub.running() as running:
        running.add("acme/tiny", checkpoint)
        yield running


@pytest.fixture(autouse=True)
def _this_process_stays_as_it_is() -> Iterator[None]:
    """The commands set up logging and signals, which in `run` belong to pytest."""
    root, ours = logging.getLogger(), logging.getLogger("tgi_shard")
    handlers, levels, on_stop = root.handlers[:], (root.level, ours.level), signal.getsignal(signal.SIGTERM)
    yield
    logging.captureWarnings(False)
    root.handlers = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    signal.signal(signal.SIGTERM, on_stop)


def run(*arguments: str, **environment: str) -> Result:
    """In this process: for what ends before anything starts."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    unset: dict[str, str | None] = dict.fromkeys(names)
    return CliRunner().invoke(cli.main, arguments, env=unset | environment)


def run_process(
    *arguments: str, input: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(*arguments),
        input=input,
        env=_environment(**environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).parent / "text-generation-server"), *arguments]


def _environment(**environment: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return inherited | environment


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--quantize", "gptq"),
        ("--speculate", "2"),
        ("--kv-cache-dtype", "fp8_e5m2"),
    ],
)
def test_options_whose_feature_is_to_come_end_the_command(checkpoint: Path, option: str, value: str) -> None:
    result = run("serve", str(checkpoint), option, value)
    assert result.exit_code == 1
    assert result.stderr == f"Error: {option} {value} is not available yet.\n"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LORA_ADAPTERS": "a,b"}, "LORA_ADAPTERS a,b is not available yet."),
        ({"ROPE_SCALING": "dynamic"}, "ROPE_SCALING dynamic is not available yet; linear is."),
        ({"ROPE_FACTOR": "0.5"}, "ROPE_FACTOR must be at least 1. Given: 0.5"),
        ({"TGI_WIGGLE_ROOM": "1.0"}, "TGI_WIGGLE_ROOM must be greater than 0 and less than 1. Given: 1.0"),
        (
            {"CUDA_MEMORY_FRACTION": "half"},
            "The environment variable CUDA_MEMORY_FRACTION has the invalid value 'half'.",
        ),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but --sharded is not given."),
    ],
)
def test_variables_are_checked(checkpoint: Path, environment: dict[str, str], message: str) -> None:
    result = run("serve", str(checkpoint), **environment)
    assert (result.exit_code, result.stderr) == (1, f"Error: {message}\n")


@pytest.mark.parametrize("missing", GROUP)
def test_a_shard_needs_to_know_its_group(checkpoint: Path, missing: str) -> None:
    environment = {name: value for name, value in GROUP.items() if name != missing}
    result = run("serve", str(checkpoint), "--sharded", **environment)
    assert (result.exit_code, result.stderr) == (1, f"Error: {missing} must be set when sharded is True\n")


def test_dtype_and_quantize_exclude_each_other(checkpoint: Path) -> None:
    result = run("serve", str(checkpoint), "--dtype", "float16", "--quantize", "awq")
    assert "Only 1 can be set between `dtype` and `quantize`" in result.stderr


def test_usage_errors_are_told_apart() -> None:
    assert run("serve").exit_code == 2
    assert run("serve", "model", "--dtype", "float8").exit_code == 2
    assert run("download-weights", "model", "--logger-level", "loud").exit_code == 2


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    settings: list[Settings] = []
    monkeypatch.setattr(service, "serve", settings.append)
    return settings


def test_settings_hold_options_and_environment(
    served: list[Settings], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ("--sharded", "--dtype", "float32", "--uds-path", "/tmp/x", "--max-input-tokens", "64")
    environment = {
        "CUDA_MEMORY_FRACTION": "0.5",
        "TGI_WIGGLE_ROOM": "0.8",
        "ROPE_FACTOR": "2",
        "WATERMARK_GAMMA": "0.4",
        "WATERMARK_DELTA": "1.5",
    }
    result = run("serve", str(checkpoint), *options, **GROUP, **environment)
    assert result.exit_code == 0, result.output
    [settings] = served
    assert (settings.rank, settings.world_size) == (1, 2)
    assert (settings.master_addr, settings.master_port) == ("127.0.0.1", 29501)
    assert (settings.model_path, settings.uds_path) == (checkpoint, "/tmp/x")
    assert (settings.dtype, settings.device) == (torch.float32, torch.device("cpu"))
    assert settings.memory_fraction == pytest.approx(0.4)
    assert (settings.watermark_gamma, settings.watermark_delta) == (0.4, 1.5)
    assert settings.rope_override is not None
    assert settings.rope_override.factor == 2.0
    assert settings.max_input_tokens == 64


def test_settings_by_default(served: list[Settings], checkpoint: Path) -> None:
    result = run("serve", str(checkpoint), "--speculate", "0")
    assert result.exit_code == 0, result.output
    [settings] = served
    assert (settings.rank, settings.world_size, settings.dtype, settings.rope_override) == (0, 1, None, None)
    assert settings.memory_fraction == pytest.approx(0.9)
    assert (settings.watermark_gamma, settings.watermark_delta) == (0.5, 2.0)


def test_serve_wants_the_model_to_be_here(served: list[Settings], tmp_path: Path) -> None:
    result = run("serve", "acme/tiny", HUGGINGFACE_HUB_CACHE=str(tmp_path))
    assert result.exit_code == 1
    assert (
        f"not found in {tmp_path}. Please run `text-generation-server download-weights acme/tiny`"
        in result.stderr
    )
    assert served == []


def test_a_model_that_cannot_be_served_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "elephant"}))
    done = run_process("serve", str(tmp_path), "--uds-path", str(tmp_path / "socket"))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("Error: ")
    assert "elephant" in done.stderr


def test_ranks_that_stand_by_hold_nothing_and_serve_once_told(checkpoint: Path, tmp_path: Path) -> None:
    options = ("--sharded", "--uds-path", str(tmp_path / "s"), "--standby")
    shards = []
    for rank in ("0", "1"):
        log_path = tmp_path / f"{rank}.log"
        with log_path.open("w") as log:
            process = subprocess.Popen(
                _command("serve", str(checkpoint), *options),
                env=_environment(RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        shards.append(ShardProcess(process, tmp_path / f"s-{rank}", log_path))
    try:
        for shard in shards:
            _wait_until_it_waits(shard.process.pid)
            process = psutil.Process(shard.process.pid)
            assert any("libtorch_cpu" in mapped.path for mapped in process.memory_maps())
            assert not any(mapped.path.endswith(".safetensors") for mapped in process.memory_maps())
            assert process.net_connections("all") == []
            assert shard.log_path.read_text() == ""
            assert not shard.socket_path.exists()
        port = free_port()
        for shard in shards:
            assert shard.process.stdin is not None
            shard.process.stdin.write(json.dumps({"MASTER_PORT": str(port)}) + "\n")
            shard.process.stdin.close()
        for shard in shards:
            shard.wait_until_ready()
            shard.process.send_signal(signal.SIGTERM)
            shard.wait_until_ended()
            assert shard.process.returncode == 0
    finally:
        for shard in shards:
            shard.process.kill()
            shard.process.wait()


def _wait_until_it_waits(pid: int) -> None:
    """For input: in no other way does it use no time for so long, with torch imported."""
    process = psutil.Process(pid)
    deadline = time.monotonic() + 120
    num_quiet, used = 0, -1.0
    while num_quiet < 10:
        assert time.monotonic() < deadline
        times = process.cpu_times()
        num_quiet = num_quiet + 1 if times.user + times.system == used > 1 else 0
        used = times.user + times.system
        time.sleep(0.1)


def test_one_that_stands_by_ends_with_its_launcher(checkpoint: Path, tmp_path: Path) -> None:
    """The end of its input is how it would notice, were it not killed before."""
    options = ("--uds-path", str(tmp_path / "s"), "--standby")
    done = run_process("serve", str(checkpoint), *options, input="")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "s-0").exists()


@pytest.mark.parametrize("level", ["WARN", "WARNING", "warn"])
def test_levels_go_by_both_names(checkpoint: Path, level: str) -> None:
    assert run("download-weights", str(checkpoint), "--logger-level", level).exit_code == 0


def test_download_weights_prints_the_folder_last(server: FakeHub, tmp_path: Path) -> None:
    # As the launcher starts it, on an image that sets a variable which the hub's client warns about.
    options = ("--extension", ".safetensors", "--logger-level", "INFO", "--json-output", "--merge-lora")
    environment = {
        "HF_ENDPOINT": server.url,
        "HUGGINGFACE_HUB_CACHE": str(tmp_path),
        "HF_HUB_ENABLE_HF_TRANSFER": "1",
    }
    done = run_process("download-weights", "acme/tiny", *options, **environment)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    folder = Path(json.loads(last)["model_path"])
    assert json.loads(last) == {"model_path": str(folder)}
    assert (folder / "model.safetensors").is_file()
    assert folder.is_relative_to(tmp_path)
    assert [_text(line) for line in lines if "Download file" in line] == ["Download file: model.safetensors"]

    again = run_process("download-weights", "acme/tiny", *options, **environment, HF_HUB_OFFLINE="1")
    *lines, last_again = again.stdout.splitlines()
    assert last_again == last
    assert [_text(line) for line in lines] == ["Files are already present on the host. Skipping download."]


def test_a_failed_download_says_why_on_stderr(server: FakeHub, tmp_path: Path) -> None:
    server.add("acme/private", server.repositories["acme/tiny"].folder, token="sesame")
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
    done = run_process("download-weights", "acme/private", **environment, HF_TOKEN="wrong")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: Model acme/private was not found")
    assert len(done.stderr.splitlines()) == 1
    for name in ("HF_TOKEN", "HF_API_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        assert (
            run_process("download-weights", "acme/private", **environment, **{name: "sesame"}).returncode == 0
        )


def test_a_local_folder_needs_no_torch(checkpoint: Path) -> None:
    """It is what a start waits for first."""
    program = (
        "import sys; from tgi_shard.main import main; "
        f"main(['download-weights', {str(checkpoint)!r}], standalone_mode=False); "
        "sys.exit(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == (json.dumps({"model_path": str(checkpoint)}) + "\n", "[]\n")


def test_a_download_that_is_told_to_stop_leaves_nothing_behind(server: FakeHub, tmp_path: Path) -> None:
    server.failures["model.safetensors"] = 1000
    process = subprocess.Popen(
        _command("download-weights", "acme/tiny"),
        env=_environment(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 60
        while server.num_fetched("model.safetensors") == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.rglob("*.incomplete")) == []


def test_log_lines(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = (
        "import logging, warnings; from tgi_shard import logs; logs.configure('INFO', json_output={}); "
        "log = logging.getLogger('tgi_shard.x'); log.debug('no'); log.info('two\\nlines é %d', 3); "
        "warnings.warn('careful'); "
        "logging.getLogger('library').info('no'); log.exception('oops', exc_info=ValueError('why'))"
    )
    subprocess.run([sys.executable, "-c", program.format(True)], check=True, timeout=60)
    captured = capfd.readouterr()
    lines: list[dict[str, Any]] = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["record"]["level"]["name"] for line in lines] == ["INFO", "WARNING", "ERROR"]
    assert lines[0]["text"] == "two\nlines é 3"
    assert "careful" in lines[1]["text"]
    assert lines[2]["text"] == "oops\nValueError: why"
    assert lines[0]["record"]["time"]["repr"].endswith("Z")
    assert captured.err == ""

    subprocess.run([sys.executable, "-c", program.format(False)], check=True, timeout=60)
    first, second, *_ = capfd.readouterr().out.splitlines()
    assert first.endswith("   INFO tgi_shard.x: two")
    assert second == "lines é 3"


def _text(line: str) -> str:
    text: str = json.loads(line)["text"]
    return text
