"""Plans as plain calls: options in, argv and environment of every process out."""

import json
import re
from pathlib import Path

import click
import pytest

from tgi_launcher.devices import Devices
from tgi_launcher.errors import LauncherError
from tgi_launcher.logs import Level
from tgi_launcher.model_info import ModelInfo, NoConfig, probe, read
from tgi_launcher.options import describe, parse, rows
from tgi_launcher.plan import (
    Plan,
    Rendezvous,
    download_command,
    memory_command,
    resolve,
    router_command,
    shard_command,
    standby_command,
    turn,
)

CPU = Devices(num_visible=None, card=None, memory_bytes=None, num_cores=8)
H100 = Devices(num_visible=2, card="nvidia-h100-80gb-hbm3", memory_bytes=81559 << 20, num_cores=64)
FOLDER = Path("/models/m")
LLAMA_8B = read(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    }
)


def plan(
    *argv: str,
    environ: dict[str, str] | None = None,
    model: ModelInfo | None = None,
    devices: Devices = CPU,
) -> Plan:
    environ = environ or {}
    return resolve(parse(argv, environ), model, devices, environ)


def messages(made: Plan, level: Level) -> list[str]:
    return [notice.message for notice in made.notices if notice.level == level]


def shard(made: Plan, rank: int = 0) -> tuple[list[str], dict[str, str]]:
    command = shard_command(made, FOLDER, rank, Rendezvous("/run/s", 29511))
    return list(command.argv), dict(command.environ)


def router(made: Plan) -> tuple[list[str], dict[str, str]]:
    command = router_command(made, FOLDER, Path("/run/s-0"))
    return list(command.argv), dict(command.environ)


DEFAULT_ROUTER = {
    "--master-shard-uds-path": "/run/s-0",
    "--served-model-name": "bigscience/bloom-560m",
    "--tokenizer-name": "/models/m",
    "--validation-workers": "2",
    "--max-concurrent-requests": "128",
    "--max-best-of": "2",
    "--max-stop-sequences": "4",
    "--max-top-n-tokens": "5",
    "--waiting-served-ratio": "0.3",
    "--max-batch-prefill-tokens": "512",
    "--max-waiting-tokens": "20",
    "--hostname": "0.0.0.0",
    "--port": "3000",
    "--prometheus-port": "9000",
    "--otlp-service-name": "text-generation-inference.router",
    "--max-client-batch-size": "4",
    "--usage-stats": "on",
    "--payload-limit": "2000000",
    "--stall-timeout": "60",
}
DEFAULT_SHARD_ENVIRON = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29511",
    "CUDA_MEMORY_FRACTION": "1.0",
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
    "SAFETENSORS_FAST_GPU": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "8",
    "GOMP_SPINCOUNT": "10000",
}


def pairs(argv: list[str]) -> dict[str, str]:
    return dict(zip(argv[1::2], argv[2::2], strict=True))


def test_defaults() -> None:
    made = plan()
    download = download_command(made)
    assert download.argv == (
        *("text-generation-server", "download-weights", "bigscience/bloom-560m"),
        *("--logger-level", "INFO", "--json-output"),
    )
    assert download.environ == {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    assert shard(made) == (
        [
            *("text-generation-server", "serve", "/models/m", "--uds-path", "/run/s"),
            *("--logger-level", "INFO", "--json-output"),
        ],
        DEFAULT_SHARD_ENVIRON,
    )
    argv, environ = router(made)
    assert argv[0] == "text-generation-router"
    assert pairs(argv) == DEFAULT_ROUTER
    assert environ == {}
    assert messages(made, Level.INFO) == ["Default `max_batch_prefill_tokens` to 512"]


def test_everything_that_can_be_passed_on_is_passed_on(tmp_path: Path) -> None:
    config = tmp_path / "t.json"
    config.touch()
    made = plan(
        *("--model-id", "org/name", "--revision", "refs/pr/3", "--validation-workers", "3"),
        *("--sharded", "true", "--num-shard", "2", "--dtype", "float32", "--trust-remote-code"),
        *(
            "--max-concurrent-requests",
            "7",
            "--max-queue-time",
            "5",
            "--max-best-of",
            "8",
            "--max-stop-sequences",
            "9",
        ),
        *("--max-top-n-tokens", "10", "--max-input-tokens", "100", "--max-total-tokens", "200"),
        *("--waiting-served-ratio", "1.5", "--max-batch-prefill-tokens", "300"),
        *("--max-batch-total-tokens", "4000", "--max-waiting-tokens", "11", "--max-batch-size", "12"),
        *("--cuda-graphs", "0", "--hostname", "127.0.0.1", "-p", "80", "--prometheus-port", "9001"),
        *("--master-addr", "10.0.0.1", "--huggingface-hub-cache", "/hub"),
        *("--weights-cache-override", "/weights", "--disable-custom-kernels"),
        *("--cuda-memory-fraction", "0.5", "--rope-scaling", "linear", "--rope-factor", "2"),
        *("--json-output", "--otlp-service-name", "me", "--cors-allow-origin", "https://a"),
        *("--cors-allow-origin", "https://b", "--api-key", "secret", "--watermark-gamma", "0.25"),
        *("--watermark-delta", "1.5", "--tokenizer-config-path", str(config), "--disable-grammar-support"),
        *("--max-client-batch-size", "13", "--usage-stats", "off", "--payload-limit", "14"),
        *("--enable-prefill-logprobs", "-g", "15", "--max-restarts", "16", "--speculate", "0"),
        *("--stall-timeout", "17"),
    )
    download = download_command(made)
    assert download.argv == (
        *("text-generation-server", "download-weights", "org/name", "--revision", "refs/pr/3"),
        *("--trust-remote-code", "--logger-level", "INFO", "--json-output"),
    )
    assert download.environ == {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HUGGINGFACE_HUB_CACHE": "/hub",
        "WEIGHTS_CACHE_OVERRIDE": "/weights",
    }
    assert shard(made, rank=1) == (
        [
            *("text-generation-server", "serve", "/models/m", "--uds-path", "/run/s"),
            *("--logger-level", "INFO", "--json-output", "--sharded", "--revision", "refs/pr/3"),
            *("--dtype", "float32", "--trust-remote-code", "--max-input-tokens", "100"),
        ],
        DEFAULT_SHARD_ENVIRON
        | {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "10.0.0.1",
            "OMP_NUM_THREADS": "4",
            "CUDA_MEMORY_FRACTION": "0.5",
            "MAX_TOTAL_TOKENS": "200",
            "MAX_BATCH_SIZE": "12",
            "HUGGINGFACE_HUB_CACHE": "/hub",
            "WEIGHTS_CACHE_OVERRIDE": "/weights",
            "DISABLE_CUSTOM_KERNELS": "True",
            "ROPE_SCALING": "linear",
            "ROPE_FACTOR": "2.0",
            "WATERMARK_GAMMA": "0.25",
            "WATERMARK_DELTA": "1.5",
            "REQUEST_LOGPROBS": "1",
        },
    )
    assert router(made) == (
        [
            *("text-generation-router", "--master-shard-uds-path", "/run/s-0"),
            *("--served-model-name", "org/name", "--tokenizer-name", "/models/m"),
            *("--revision", "refs/pr/3", "--validation-workers", "3", "--trust-remote-code"),
            *(
                "--max-concurrent-requests",
                "7",
                "--max-queue-time",
                "5",
                "--max-best-of",
                "8",
                "--max-stop-sequences",
                "9",
            ),
            *("--max-top-n-tokens", "10", "--max-input-tokens", "100", "--max-total-tokens", "200"),
            *("--waiting-served-ratio", "1.5", "--max-batch-prefill-tokens", "300"),
            *("--max-batch-total-tokens", "4000", "--max-waiting-tokens", "11", "--max-batch-size", "12"),
            *("--hostname", "127.0.0.1", "--port", "80", "--prometheus-port", "9001", "--json-output"),
            *("--otlp-service-name", "me", "--cors-allow-origin", "https://a"),
            *("--cors-allow-origin", "https://b", "--tokenizer-config-path", str(config)),
            *("--disable-grammar-support", "--max-client-batch-size", "13", "--usage-stats", "off"),
            *("--payload-limit", "14", "--enable-prefill-logprobs", "--stall-timeout", "17"),
        ],
        {"API_KEY": "secret"},
    )
    assert messages(made, Level.WARN) == [
        "`trust_remote_code` is set. Trusting that model `org/name` do not contain malicious code."
    ]
    assert messages(made, Level.INFO) == ["Sharding model on 2 processes"]


def test_the_memory_plan_is_asked_of_the_shards_code() -> None:
    made = plan(
        *("--plan", "--model-id", "org/name", "--revision", "r", "--num-shard", "2", "--dtype", "float16"),
        *("--max-total-tokens", "200", "--max-concurrent-requests", "7", "--cuda-memory-fraction", "0.5"),
        *("--huggingface-hub-cache", "/hub", "--max-input-tokens", "100", "--rope-factor", "2"),
    )
    command = memory_command(made, "org/name")
    assert command.argv == (
        *("text-generation-server", "plan", "org/name", "--num-shard", "2"),
        *("--max-batch-prefill-tokens", "512", "--max-batch-size", "7"),
        *("--revision", "r", "--dtype", "float16"),
    )
    assert command.environ == {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HUGGINGFACE_HUB_CACHE": "/hub",
        "CUDA_MEMORY_FRACTION": "0.5",
        "MAX_TOTAL_TOKENS": "200",
        "ROPE_SCALING": "linear",
        "ROPE_FACTOR": "2.0",
    }


def test_every_option_has_a_variable_and_the_flag_wins() -> None:
    assert plan(environ={"MAX_INPUT_TOKENS": "5"}).max_input_tokens == 5
    assert plan("--max-input-tokens", "6", environ={"MAX_INPUT_TOKENS": "5"}).max_input_tokens == 6
    for name, row in rows():
        assert row.has_variable == (name not in ("env", "plan"))
    options = parse([], {"CORS_ALLOW_ORIGIN": "https://a https://b", "CUDA_GRAPHS": "0,-1", "PORT": "81"})
    assert options.cors_allow_origin == ("https://a https://b",)
    assert options.cuda_graphs == (0, -1)
    assert options.given == {"cors_allow_origin", "cuda_graphs", "port"}


def test_what_stands_by_is_a_shard_but_for_what_it_is_told(tmp_path: Path) -> None:
    made = plan("--num-shard", "2", "--max-total-tokens", "100")
    at = Rendezvous("/run/s", 29511)
    serving, waiting = shard_command(made, FOLDER, 1, at), standby_command(made, FOLDER, 1, at.uds_path)
    assert waiting.argv == (*serving.argv, "--standby")
    assert {**waiting.environ, **json.loads(turn(at))} == serving.environ


def test_standby_shards_are_on_unless_told() -> None:
    assert parse([], {}).standby_shards
    assert not parse(["--no-standby-shards"], {}).standby_shards
    assert not parse([], {"STANDBY_SHARDS": "false"}).standby_shards
    assert parse(["--standby-shards"], {"STANDBY_SHARDS": "false"}).standby_shards


@pytest.mark.parametrize("name", ["JSON_OUTPUT", "TRUST_REMOTE_CODE", "SHARDED", "NGROK", "STANDBY_SHARDS"])
def test_booleans_in_the_environment_are_true_or_false(name: str) -> None:
    field = name.lower()
    assert getattr(parse([], {name: "true"}), field) is True
    assert getattr(parse([], {name: "false"}), field) is False
    for vague in ("1", "yes", "True", ""):
        with pytest.raises(click.UsageError):
            parse([], {name: vague})


@pytest.mark.parametrize(
    ("argv", "environ"),
    [
        (["--json-output=true"], {}),
        (["--sharded"], {}),
        (["--sharded", "yes"], {}),
        (["--port", "65536"], {}),
        (["--num-shard", "-1"], {}),
        (["--num-shard", "two"], {}),
        (["--dtype", "int8"], {}),
        (["--cuda-graphs", "1,x"], {}),
        (["--tokenizer-config-path", "/no/such/file"], {}),
        (["--max-total-tokens", "0"], {}),
        (["stray"], {}),
        ([], {"API_KEY": ""}),
        ([], {"MAX_TOTAL_TOKENS": ""}),
        ([], {"PORT": "tcp://10.0.0.1:80"}),
    ],
)
def test_what_cannot_be_parsed_is_a_usage_error(argv: list[str], environ: dict[str, str]) -> None:
    with pytest.raises(click.UsageError) as error:
        parse(argv, environ)
    assert error.value.exit_code == 2


TWO = Devices(num_visible=2, card=None, memory_bytes=None, num_cores=2)
ONE = Devices(num_visible=1, card=None, memory_bytes=None, num_cores=2)


@pytest.mark.parametrize(
    ("argv", "devices", "num_shard"),
    [
        (["--sharded", "true"], TWO, 2),
        (["--sharded", "true", "--num-shard", "3"], ONE, 3),
        (["--sharded", "false", "--num-shard", "3"], TWO, 3),
        (["--sharded", "false"], TWO, 1),
        (["--num-shard", "3"], TWO, 3),
        ([], TWO, 2),
        ([], CPU, 1),
    ],
)
def test_number_of_shards(argv: list[str], devices: Devices, num_shard: int) -> None:
    assert plan(*argv, devices=devices).num_shard == num_shard


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (
            "--sharded true",
            'NotEnoughCUDADevices("`sharded` is true but only found 1 CUDA devices")',
        ),
        (
            "--sharded true --num-shard 1",
            'ArgumentValidation("`sharded` is true but `num_shard` <= 1")',
        ),
        ("--num-shard 0", 'ArgumentValidation("`num_shard` cannot be < 1")'),
        (
            "--num-shard 2 --quantize exl2",
            'ArgumentValidation("Sharding is currently not supported with `exl2` quantization")',
        ),
        (
            "--max-input-tokens 1 --max-input-length 2",
            'ArgumentValidation("Both `max_input_tokens` (1) and `max_input_length` (2) are set. Please '
            'define only `max_input_tokens` as `max_input_length is deprecated for naming consistency.")',
        ),
        (
            "--max-input-length 5 --max-total-tokens 5",
            'ArgumentValidation("`max_input_tokens`(5) must be < `max_total_tokens`(5)")',
        ),
        ("--validation-workers 0", 'ArgumentValidation("`validation_workers` must be > 0")'),
        (
            "--max-total-tokens 6 --max-batch-total-tokens 5",
            'ArgumentValidation("`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 6 and 5")',
        ),
        (
            "--ngrok",
            'ArgumentValidation("`ngrok-authtoken` must be set when using ngrok tunneling")',
        ),
        (
            "--ngrok --ngrok-authtoken x",
            'ArgumentValidation("`ngrok-edge` must be set when using ngrok tunneling")',
        ),
        ("--lora-adapters a,b@c@d", 'ArgumentValidation("Invalid LoRA adapter format: b@c@d")'),
        ("--max-batch-size 0", 'ArgumentValidation("`max_batch_size` must be > 0")'),
        (
            "--max-batch-prefill-tokens 6 --max-batch-total-tokens 5",
            'ArgumentValidation("`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. '
            'Given: 6 and 5")',
        ),
        (
            "--cuda-memory-fraction 1.5",
            'ArgumentValidation("`cuda_memory_fraction` must be > 0 and <= 1. Given: 1.5")',
        ),
        ("--rope-factor 0.5", 'ArgumentValidation("`rope_factor` must be >= 1. Given: 0.5")'),
    ],
)
def test_validation(argv: str, error: str) -> None:
    with pytest.raises(LauncherError) as raised:
        plan(*argv.split(), devices=ONE)
    assert str(raised.value) == error
    assert raised.value.exit_code == 1


def test_sharding_over_an_unknown_number_of_devices() -> None:
    with pytest.raises(LauncherError, match="are not set") as raised:
        plan("--sharded", "true", devices=CPU)
    assert raised.value.exit_code == 101


@pytest.mark.parametrize(
    "argv",
    [
        "--quantize gptq",
        "--speculate 3",
        "--kv-cache-dtype fp8_e5m2",
        "--lora-adapters org/adapter",
        "--cuda-graphs 1,2",
        "--ngrok-edge e",
        "--rope-scaling dynamic",
    ],
)
def test_no_option_is_taken_and_ignored(argv: str) -> None:
    flag = argv.split()[0]
    with pytest.raises(LauncherError, match=f'"{flag} .*is not available yet: ') as raised:
        plan(*argv.split())
    assert raised.value.exit_code == 1


def test_environment_of_the_children() -> None:
    environ = {
        "LOG_LEVEL": "warn",
        "HF_API_TOKEN": "t",
        "HF_TOKEN": "old",
        "OMP_NUM_THREADS": "3",
        "CUSTOM": "1",
    }
    made = plan(environ=environ)
    argv, shard_environ = shard(made)
    assert argv[argv.index("--logger-level") + 1] == "WARNING"
    for child in (dict(download_command(made).environ), shard_environ):
        assert "LOG_LEVEL" not in child
        assert child["HF_TOKEN"] == "t"
        assert child["CUSTOM"] == "1"
    assert shard_environ["OMP_NUM_THREADS"] == "3"
    assert shard_environ["GOMP_SPINCOUNT"] == "10000"
    assert shard(plan(environ={"GOMP_SPINCOUNT": "7"}))[1]["GOMP_SPINCOUNT"] == "7"
    assert "GOMP_SPINCOUNT" not in shard(plan(environ={"OMP_WAIT_POLICY": "active"}))[1]
    assert router(made)[1] == environ | {"HF_TOKEN": "t"}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], None),
        (["--rope-factor", "4"], ("linear", "4.0")),
        (["--rope-scaling", "linear"], ("linear", "1.0")),
    ],
)
def test_rope_overrides(argv: list[str], expected: tuple[str, str] | None) -> None:
    environ = shard(plan(*argv))[1]
    assert (environ.get("ROPE_SCALING"), environ.get("ROPE_FACTOR")) == (expected or (None, None))


@pytest.mark.parametrize(
    ("argv", "max_position_embeddings", "value"),
    [
        ([], None, 512),
        ([], 8192, 512),
        ([], 256, 256),
        ([], 64, 128),  # all 128 requests decode in one step
        (["--max-concurrent-requests", "1000"], 8192, 1000),
        (["--max-concurrent-requests", "100000"], 8192, 4096),
        (["--max-concurrent-requests", "1000", "--max-batch-size", "16"], 8192, 512),
        (["--max-batch-total-tokens", "100"], 8192, 100),
        (["--max-batch-prefill-tokens", "7"], 8192, 7),
    ],
)
def test_prefill_budget_on_a_cpu(argv: list[str], max_position_embeddings: int | None, value: int) -> None:
    model = ModelInfo(max_position_embeddings=max_position_embeddings)
    assert plan(*argv, model=model).max_batch_prefill_tokens == value


def test_prefill_budget_on_gpus() -> None:
    made = plan(devices=H100, model=LLAMA_8B)
    # 900e12 * 2 // (32 * (2 * 128 * 4096 * (3 * 32 + 2 * 8) + 6 * 4096 * 14336))
    assert made.max_batch_prefill_tokens == 119741
    assert made.compute_type == "2-nvidia-h100-80gb-hbm3"
    assert router(made)[1] == {"COMPUTE_TYPE": "2-nvidia-h100-80gb-hbm3"}
    small = Devices(num_visible=1, card="nvidia-a10g", memory_bytes=17 << 30, num_cores=8)
    made = plan(devices=small, model=LLAMA_8B)
    assert 4000 < made.max_batch_prefill_tokens < 6000
    (warning,) = messages(made, Level.WARN)
    assert warning.startswith("Reducing the max batch prefill from 8315 to")
    tiny = Devices(num_visible=1, card="nvidia-t4", memory_bytes=15 << 30, num_cores=8)
    assert "Not enough VRAM to run the model" in messages(plan(devices=tiny, model=LLAMA_8B), Level.WARN)[0]
    unknown = Devices(num_visible=1, card="nvidia-x", memory_bytes=None, num_cores=8)
    assert plan(devices=unknown).max_batch_prefill_tokens == 4096
    assert plan(devices=unknown, model=ModelInfo(model_type="gemma3")).max_batch_prefill_tokens == 8000


DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2",
    **{"hidden_size": 2048, "num_hidden_layers": 27, "vocab_size": 102400, "intermediate_size": 10944},
    **{"num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 1408},
    **{"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6},
}


def test_latents_and_experts_of_their_own_size_are_counted() -> None:
    """The authors: 15.7 billion parameters, 2.4 billion of them for each token."""
    model = read(DEEPSEEK_V2_LITE)
    large = Devices(num_visible=1, card="nvidia-h100", memory_bytes=80 << 30, num_cores=8)
    budget = plan(devices=large, model=model).max_batch_prefill_tokens
    assert budget == pytest.approx(900e12 / (2 * 2.4e9), rel=0.1)
    small = Devices(num_visible=1, card="nvidia-a10g", memory_bytes=22 << 30, num_cores=8)
    (warning,) = messages(plan(devices=small, model=model), Level.WARN)
    assert float(re.search(r"Model ([\d.]+)GB", warning).group(1)) == pytest.approx(2 * 15.7, rel=0.05)


def test_config_fields_have_several_names() -> None:
    gpt2 = read({"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024})
    assert (gpt2.head_dim, gpt2.num_kv_heads, gpt2.max_position_embeddings) == (64, 12, 1024)
    assert read({"text_config": {"head_dim": 80}}).head_dim == 80
    assert read({"model_type": "gemma3"}).head_dim == 256
    gemma3 = read(
        {"model_type": "gemma3", "vision_config": {"hidden_size": 9}}
        | {"text_config": {"model_type": "gemma3_text", "hidden_size": 7, "max_position_embeddings": 11}}
    )
    assert (gemma3.model_type, gemma3.is_vision) == ("gemma3", True)
    assert (gemma3.hidden_size, gemma3.max_position_embeddings) == (7, 11)
    for broken in ([], {"hidden_size": "768"}, {"quantization_config": {"quant_method": 4}}):
        with pytest.raises(NoConfig):
            read(broken)


def test_config_is_read_from_a_folder_or_from_the_hub_s_cache(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert probe(str(folder), None, {}, None).model_type == "llama"
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "gpt2"}')
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    assert probe("org/name", None, {}, str(tmp_path)).model_type == "gpt2"
    with pytest.raises(NoConfig):
        probe(str(tmp_path), None, {}, None)
    with pytest.raises(NoConfig):
        probe("not a/hub/id", None, {}, str(tmp_path))


def test_secrets_are_masked_in_the_description() -> None:
    text = describe(parse(["--api-key", "secret", "--ngrok-authtoken", "hidden"], {}))
    assert "secret" not in text
    assert "hidden" not in text
    assert '    api_key: "***",\n' in text
    assert "    json_output: false,\n" in text
    assert "    revision: None,\n" in text


def test_positions_of_an_encoder_decoder_limit_no_step() -> None:
    t5 = read({"model_type": "t5", "is_encoder_decoder": True, "n_positions": 512, "d_model": 512})
    assert t5.max_position_embeddings is None
