"""Options + model + devices -> argv and environment of every process. Pure: it reads and starts nothing.

`resolve` checks the options and settles what was left open; the `*_command` functions write the result down
for one process.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tgi_launcher import prefill_budget
from tgi_launcher.devices import Devices
from tgi_launcher.errors import (
    ArgumentValidation,
    NotAvailableYet,
    NotEnoughCUDADevices,
    UnknownDeviceCount,
)
from tgi_launcher.logs import Level, level_from
from tgi_launcher.model_info import ModelInfo
from tgi_launcher.options import Options, forward

# How often a thread of libgomp looks for more work before it sleeps: about 0.1 ms, longer than it takes from
# one operation of a step to the next. It looks for several milliseconds by itself. Where anything else runs,
# two threads on one core then wait for each other's time slices, and a step takes 50 times as long.
SPIN_COUNT = 10_000
MAX_SOCKET_PATH_BYTES = 107  # sizeof(sockaddr_un.sun_path) less the final zero
DEVICE_VARIABLES = "CUDA_VISIBLE_DEVICES/NVIDIA_VISIBLE_DEVICES/ZE_AFFINITY_MASK"
LOGGER_LEVELS = {
    Level.DEBUG: "DEBUG",
    Level.INFO: "INFO",
    Level.WARN: "WARNING",
    Level.ERROR: "ERROR",
    Level.OFF: "CRITICAL",
}


@dataclass(frozen=True, slots=True)
class Command:
    argv: tuple[str, ...]  # the first is the executable's bare name
    environ: Mapping[str, str]  # all of it


@dataclass(frozen=True, slots=True)
class Notice:
    """A decision that the person at the terminal should see."""

    level: Level
    message: str


@dataclass(frozen=True, slots=True)
class Plan:
    options: Options
    environ: Mapping[str, str]  # the launcher's own
    num_shard: int
    num_threads: int  # CPU threads of each shard
    max_input_tokens: int | None
    max_batch_prefill_tokens: int
    compute_type: str | None
    log_level: Level
    notices: tuple[Notice, ...]

    @property
    def port(self) -> int:
        """Where the router listens."""
        return self.options.aip_http_port or self.options.port


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the processes of this launcher find one another."""

    uds_path: str  # prefix of the shards' sockets
    master_port: int


def resolve(options: Options, model: ModelInfo | None, devices: Devices, environ: Mapping[str, str]) -> Plan:
    """`model` None: config.json could not be read. Raises LauncherError."""
    notices: list[Notice] = []
    num_shard = _num_shard(options, devices, notices)
    _check(options, num_shard)
    _refuse_what_comes_later(options)
    if options.trust_remote_code:
        notices.append(
            Notice(
                Level.WARN,
                f"`trust_remote_code` is set. Trusting that model `{options.model_id}` do not contain "
                "malicious code.",
            )
        )
    return Plan(
        options=options,
        environ=environ,
        num_shard=num_shard,
        num_threads=max(1, devices.num_cores // num_shard),
        max_input_tokens=_max_input_tokens(options),
        max_batch_prefill_tokens=_max_batch_prefill_tokens(
            options, model, devices, num_shard, environ, notices
        ),
        compute_type=environ.get("COMPUTE_TYPE") or (f"{num_shard}-{devices.card}" if devices.card else None),
        log_level=level_from(environ.get("LOG_LEVEL")),
        notices=tuple(notices),
    )


def _num_shard(options: Options, devices: Devices, notices: list[Notice]) -> int:
    """launcher.md, section 4.3."""
    num_shard = options.num_shard
    if options.sharded:
        if num_shard is None:
            notices.append(Notice(Level.INFO, f"Parsing num_shard from {DEVICE_VARIABLES}"))
            if devices.num_visible is None:
                raise UnknownDeviceCount(f"--num-shard and {DEVICE_VARIABLES} are not set")
            if devices.num_visible <= 1:
                raise NotEnoughCUDADevices(
                    f"`sharded` is true but only found {devices.num_visible} CUDA devices"
                )
            num_shard = devices.num_visible
        elif num_shard <= 1:
            raise ArgumentValidation("`sharded` is true but `num_shard` <= 1")
    elif num_shard is None:
        num_shard = 1 if options.sharded is False else devices.num_visible or 1
    if num_shard < 1:
        raise ArgumentValidation("`num_shard` cannot be < 1")
    if num_shard > 1:
        notices.append(Notice(Level.INFO, f"Sharding model on {num_shard} processes"))
    return num_shard


def _max_input_tokens(options: Options) -> int | None:
    return options.max_input_tokens if options.max_input_tokens is not None else options.max_input_length


def _check(options: Options, num_shard: int) -> None:
    """launcher.md, section 5, in its order; then what the router would refuse after minutes of loading."""
    if num_shard > 1 and options.quantize == "exl2":
        raise ArgumentValidation("Sharding is currently not supported with `exl2` quantization")
    if options.max_input_tokens is not None and options.max_input_length is not None:
        raise ArgumentValidation(
            f"Both `max_input_tokens` ({options.max_input_tokens}) and `max_input_length` "
            f"({options.max_input_length}) are set. Please define only `max_input_tokens` as "
            "`max_input_length is deprecated for naming consistency."
        )
    max_input_tokens = _max_input_tokens(options)
    max_total_tokens = options.max_total_tokens
    if max_input_tokens is not None and max_total_tokens is not None and max_input_tokens >= max_total_tokens:
        raise ArgumentValidation(
            f"`max_input_tokens`({max_input_tokens}) must be < `max_total_tokens`({max_total_tokens})"
        )
    if options.validation_workers == 0:
        raise ArgumentValidation("`validation_workers` must be > 0")
    max_batch_total_tokens = options.max_batch_total_tokens
    if (
        max_total_tokens is not None
        and max_batch_total_tokens is not None
        and max_total_tokens > max_batch_total_tokens
    ):
        raise ArgumentValidation(
            "`max_total_tokens` must be <= `max_batch_total_tokens`. "
            f"Given: {max_total_tokens} and {max_batch_total_tokens}"
        )
    if options.ngrok and options.ngrok_authtoken is None:
        raise ArgumentValidation("`ngrok-authtoken` must be set when using ngrok tunneling")
    if options.ngrok and options.ngrok_edge is None:
        raise ArgumentValidation("`ngrok-edge` must be set when using ngrok tunneling")
    for entry in options.lora_adapters.split(",") if options.lora_adapters else ():
        if entry.count("@") > 1:
            raise ArgumentValidation(f"Invalid LoRA adapter format: {entry}")
    if options.max_batch_size == 0:
        raise ArgumentValidation("`max_batch_size` must be > 0")
    if options.max_batch_prefill_tokens == 0:
        raise ArgumentValidation("`max_batch_prefill_tokens` must be > 0")
    if (
        options.max_batch_prefill_tokens is not None
        and max_batch_total_tokens is not None
        and options.max_batch_prefill_tokens > max_batch_total_tokens
    ):
        raise ArgumentValidation(
            "`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. "
            f"Given: {options.max_batch_prefill_tokens} and {max_batch_total_tokens}"
        )
    if not 0 < options.cuda_memory_fraction <= 1:
        raise ArgumentValidation(
            f"`cuda_memory_fraction` must be > 0 and <= 1. Given: {options.cuda_memory_fraction}"
        )
    if options.rope_factor is not None and options.rope_factor < 1:
        raise ArgumentValidation(f"`rope_factor` must be >= 1. Given: {options.rope_factor}")
    longest_path = f"{options.shard_uds_path}-{num_shard - 1}"
    if len(longest_path.encode()) > MAX_SOCKET_PATH_BYTES:
        raise ArgumentValidation(
            f"`shard_uds_path` is too long: {longest_path} has more than {MAX_SOCKET_PATH_BYTES} bytes"
        )


def _refuse_what_comes_later(options: Options) -> None:
    """No option is taken and then ignored."""
    later: tuple[tuple[str, object, str], ...] = (
        ("--quantize", options.quantize, "weights are served in the type of the checkpoint or of --dtype"),
        ("--speculate", options.speculate, "every token takes a step of its own"),
        ("--kv-cache-dtype", options.kv_cache_dtype, "keys and values have the type of the model"),
        ("--lora-adapters", options.lora_adapters, "merge the adapter into the model and serve the result"),
        (
            "--cuda-graphs",
            ",".join(str(size) for size in options.cuda_graphs or () if size > 0),
            "steps run without graphs; leave it out or give 0",
        ),
        (
            "--rope-scaling",
            "dynamic" if options.rope_scaling == "dynamic" else None,
            "only linear scaling can be set",
        ),
    )
    for flag, value, reason in later:
        if value:
            raise NotAvailableYet(f"{flag} {value} is not available yet: {reason}")
    for flag, is_set in (
        ("--ngrok", options.ngrok),
        ("--ngrok-authtoken", options.ngrok_authtoken is not None),
        ("--ngrok-edge", options.ngrok_edge is not None),
    ):
        if is_set:
            raise NotAvailableYet(f"{flag} is not available yet: run a tunnel of your own in front of --port")


def _max_batch_prefill_tokens(
    options: Options,
    model: ModelInfo | None,
    devices: Devices,
    num_shard: int,
    environ: Mapping[str, str],
    notices: list[Notice],
) -> int:
    if options.max_batch_prefill_tokens is not None:
        return options.max_batch_prefill_tokens
    model = model or ModelInfo()
    if devices.card is None:
        # Every running sequence takes a token of each step: with fewer than that, some would have to wait.
        num_running = options.max_batch_size or options.max_concurrent_requests
        value = prefill_budget.on_cpu(model, num_running)
    else:
        value, warnings = prefill_budget.on_gpu(
            model, devices, num_shard, options.cuda_memory_fraction, _wiggle_room(environ)
        )
        notices.extend(Notice(Level.WARN, warning) for warning in warnings)
    if options.max_batch_total_tokens is not None:
        value = min(value, options.max_batch_total_tokens)
    notices.append(Notice(Level.INFO, f"Default `max_batch_prefill_tokens` to {value}"))
    return value


def _wiggle_room(environ: Mapping[str, str]) -> float:
    text = environ.get("TGI_WIGGLE_ROOM", "0.95")
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise ArgumentValidation(f"TGI_WIGGLE_ROOM must be a number between 0 and 1. Given: {text}")
    return value


def download_command(plan: Plan) -> Command:
    """Finds, fetches or converts the weights; its last line of output is `{"model_path": folder}`."""
    options, variables = forward("download", _values(plan))
    return Command(
        argv=(
            "text-generation-server",
            "download-weights",
            plan.options.model_id,
            *options,
            *_json_logs(plan),
        ),
        environ=_environ(plan, variables, drop="LOG_LEVEL") | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )


def memory_command(plan: Plan, model: str) -> Command:
    """Prints what the shards of `model` (a folder or hub id) would take; ends with 0 if it fits, else 1."""
    options = plan.options
    names = (
        *("revision", "dtype", "deterministic", "trust_remote_code", "huggingface_hub_cache"),
        *("cuda_memory_fraction", "rope_scaling", "rope_factor", "max_total_tokens"),
    )
    values = _values(plan)
    arguments, variables = forward("shard", {name: values[name] for name in names})
    return Command(
        argv=(
            *("text-generation-server", "plan", model),
            *("--num-shard", str(plan.num_shard)),
            *("--max-batch-prefill-tokens", str(plan.max_batch_prefill_tokens)),
            *("--max-batch-size", str(options.max_batch_size or options.max_concurrent_requests)),
            *arguments,
        ),
        environ=_environ(plan, variables, drop="LOG_LEVEL") | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )


def shard_command(plan: Plan, model_path: Path, rank: int, rendezvous: Rendezvous) -> Command:
    """The process of one rank; it listens at `{uds_path}-{rank}`."""
    values = _values(plan)
    if plan.options.otlp_endpoint is None:
        del values["otlp_service_name"]
    options, variables = forward("shard", values)
    group = {
        "RANK": str(rank),
        "WORLD_SIZE": str(plan.num_shard),
        "MASTER_ADDR": plan.options.master_addr,
        "MASTER_PORT": str(rendezvous.master_port),
    }
    fixed = {
        "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
        "SAFETENSORS_FAST_GPU": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": plan.environ.get("OMP_NUM_THREADS") or str(plan.num_threads),
    }
    if "OMP_WAIT_POLICY" not in plan.environ:
        fixed["GOMP_SPINCOUNT"] = plan.environ.get("GOMP_SPINCOUNT") or str(SPIN_COUNT)
    sharded = ("--sharded",) if plan.num_shard > 1 else ()
    return Command(
        argv=(
            *("text-generation-server", "serve", str(model_path), "--uds-path", rendezvous.uds_path),
            *_json_logs(plan),
            *sharded,
            *options,
        ),
        environ=_environ(plan, variables, drop="LOG_LEVEL") | group | fixed,
    )


def standby_command(plan: Plan, model_path: Path, rank: int, uds_path: str) -> Command:
    """A process that may become that rank: it waits until it is told `turn(rendezvous)`."""
    command = shard_command(plan, model_path, rank, Rendezvous(uds_path, plan.options.master_port))
    return Command((*command.argv, "--standby"), command.environ)


def turn(rendezvous: Rendezvous) -> bytes:
    """What a process that stands by is told: the variables that each start of the group chooses anew."""
    return json.dumps({"MASTER_PORT": str(rendezvous.master_port)}).encode()


def router_command(plan: Plan, model_path: Path, shard_socket: Path) -> Command:
    options, variables = forward("router", _values(plan) | {"model_id": str(model_path)})
    if plan.compute_type:
        variables["COMPUTE_TYPE"] = plan.compute_type
    return Command(
        argv=(
            *("text-generation-router", "--master-shard-uds-path", str(shard_socket)),
            *("--served-model-name", plan.options.model_id),
            *options,
        ),
        environ=_environ(plan, variables),
    )


def _values(plan: Plan) -> dict[str, Any]:
    """The options by name, with what the plan settled in the place of what was left open."""
    options = plan.options
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    values["max_input_tokens"] = plan.max_input_tokens
    values["max_batch_prefill_tokens"] = plan.max_batch_prefill_tokens
    if options.rope_scaling is not None or options.rope_factor is not None:
        values["rope_scaling"] = options.rope_scaling or "linear"
        values["rope_factor"] = 1.0 if options.rope_factor is None else options.rope_factor
    return values


def _json_logs(plan: Plan) -> tuple[str, ...]:
    return ("--logger-level", LOGGER_LEVELS[plan.log_level], "--json-output")


def _environ(plan: Plan, variables: Mapping[str, str], drop: str | None = None) -> dict[str, str]:
    environ = {name: value for name, value in plan.environ.items() if name != drop}
    environ |= variables
    if token := plan.environ.get("HF_API_TOKEN"):
        environ["HF_TOKEN"] = token
    return environ
