"""The command text-generation-server: `serve` runs one rank of a model, `download-weights` brings the model
here, `plan` tells what memory it would take.

The only shard file that reads the environment. Options and variables are TGI's; those whose feature is still
to come end the command with one clear sentence.
"""

import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from tgi_shard import logs
from tgi_shard.model_folder import ModelError

if TYPE_CHECKING:  # settings imports torch, hub a HTTP client: each command waits only for what it uses
    from tgi_shard.hub import Hub
    from tgi_shard.settings import Settings

T = TypeVar("T")

QUANTIZATIONS = (
    "awq",
    "compressed-tensors",
    "eetq",
    "exl2",
    "gptq",
    "marlin",
    "bitsandbytes",
    "bitsandbytes-nf4",
    "bitsandbytes-fp4",
    "fp8",
)
KV_CACHE_DTYPES = ("fp8_e4m3fn", "fp8_e5m2")
DTYPES = ("float16", "bfloat16", "float32")
DEFAULT_WIGGLE_ROOM = 0.90

_revision = click.option(
    "--revision", help="Commit, branch, tag or refs/pr/N; of no effect for a local folder."
)
_logger_level = click.option(
    "--logger-level",
    type=click.Choice(list(logs.LEVELS), case_sensitive=False),
    default="INFO",
    show_default=True,
)
_json_output = click.option(
    "--json-output/--no-json-output", default=False, help="One JSON object a log line."
)
_trust_remote_code = click.option(
    "--trust-remote-code/--no-trust-remote-code",
    default=False,
    help="Let Python code in the model's repository run.",
)
_deterministic = click.option(
    "--deterministic/--no-deterministic",
    default=False,
    help="Equal answers bit for bit, whatever else is in the batch.",
)


@click.group()
def main() -> None:
    """Run or download a model. text-generation-launcher starts these commands; they work alone as well."""
    # TGI's images set it. What it asked for is gone, and the hub's client warns of it at every start.
    os.environ.pop("HF_HUB_ENABLE_HF_TRANSFER", None)


@main.command()
@click.argument("model_id")
@_revision
@click.option("--sharded/--no-sharded", default=False, help="This is one of WORLD_SIZE ranks.")
@click.option("--quantize", type=click.Choice(QUANTIZATIONS))
@click.option("--speculate", type=click.IntRange(min=0))
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: the checkpoint's own.")
@click.option("--kv-cache-dtype", type=click.Choice(KV_CACHE_DTYPES))
@_trust_remote_code
@_deterministic
@click.option(
    "--uds-path", default="/tmp/text-generation-server", show_default=True, help="-{rank} is appended."
)
@_logger_level
@_json_output
@click.option("--otlp-endpoint", help="Collector that gets traces over OTLP/gRPC: http://host:4317.")
@click.option(
    "--otlp-service-name",
    default="text-generation-inference.server",
    show_default=True,
    help="The name in traces; of no effect without --otlp-endpoint.",
)
@click.option("--max-input-tokens", type=click.IntRange(min=1))
@click.option(
    "--standby",
    is_flag=True,
    help="Import what serving takes, then wait for a line on stdin before anything else: a JSON object of "
    "environment variables to set. If stdin ends without one, so does the command.",
)
def serve(
    model_id: str,
    revision: str | None,
    sharded: bool,
    quantize: str | None,
    speculate: int | None,
    dtype: str | None,
    kv_cache_dtype: str | None,
    trust_remote_code: bool,
    deterministic: bool,
    uds_path: str,
    logger_level: str,
    json_output: bool,
    otlp_endpoint: str | None,
    otlp_service_name: str,
    max_input_tokens: int | None,
    standby: bool,
) -> None:
    """Serve one rank of MODEL_ID (a folder, or a hub id in the cache) over gRPC on a Unix socket."""
    if quantize is not None and dtype is not None and not quantize.startswith("bitsandbytes"):
        raise _Refused(
            "Only 1 can be set between `dtype` and `quantize`, as they both decide how goes the final model."
        )
    _refuse("--quantize", quantize)
    _refuse("--speculate", speculate)
    _refuse("--kv-cache-dtype", kv_cache_dtype)
    _refuse("LORA_ADAPTERS", _environment("LORA_ADAPTERS", str, None))
    logs.configure(logger_level, json_output=json_output)
    with _without_collections():
        if standby and not _stand_by(model_id, revision):
            return
        settings = _settings(
            model_id,
            revision,
            sharded=sharded,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            deterministic=deterministic,
            uds_path=uds_path,
            max_input_tokens=max_input_tokens,
            json_output=json_output,
            logger_level=logger_level,
            otlp_endpoint=otlp_endpoint,
            otlp_service_name=otlp_service_name,
        )
        from tgi_shard import service
        from tgi_shard.tracing import TracingUnavailable

    try:
        service.serve(settings)
    except (ModelError, TracingUnavailable) as error:
        raise _Refused(str(error)) from error


@main.command()
@click.argument("model_id")
@_revision
@click.option("--extension", type=click.Choice([".safetensors"]), default=".safetensors", show_default=True)
@click.option(
    "--auto-convert/--no-auto-convert", default=True, help="Convert PyTorch weights to safetensors."
)
@_logger_level
@_json_output
@_trust_remote_code
@click.option(
    "--merge-lora/--no-merge-lora",
    default=False,
    help="Merge a PEFT adapter into its base model (not available yet).",
)
def download_weights(
    model_id: str,
    revision: str | None,
    extension: str,
    auto_convert: bool,
    logger_level: str,
    json_output: bool,
    trust_remote_code: bool,
    merge_lora: bool,
) -> None:
    """Download MODEL_ID if need be, and convert what needs it.

    The last line on stdout is {"model_path": "<folder>"}: where config, tokenizer.json and safetensors files
    now lie.
    """
    logs.configure(logger_level, json_output=json_output)
    # Asked to stop: leave through the `finally` clauses, which remove what is half written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from tgi_shard import prepare

    override = _environment("WEIGHTS_CACHE_OVERRIDE", Path, None)
    try:
        folder = prepare.prepare_model(
            _hub(),
            model_id,
            revision,
            trust_remote_code=trust_remote_code,
            auto_convert=auto_convert,
            weights_override=override,
        )
    except ModelError as error:
        raise _Refused(str(error)) from error
    print(json.dumps({"model_path": str(folder)}), flush=True)


@main.command()
@click.argument("model_id")
@_revision
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: the checkpoint's own.")
@_trust_remote_code
@_deterministic
@click.option("--num-shard", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--max-batch-prefill-tokens", type=click.IntRange(min=1), default=4096, show_default=True)
@click.option("--max-batch-size", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--max-total-tokens", type=click.IntRange(min=1), envvar="MAX_TOTAL_TOKENS")
@click.pass_context
def plan(
    context: click.Context,
    model_id: str,
    revision: str | None,
    dtype: str | None,
    trust_remote_code: bool,
    deterministic: bool,
    num_shard: int,
    max_batch_prefill_tokens: int,
    max_batch_size: int,
    max_total_tokens: int | None,
) -> None:
    """Estimate the memory of MODEL_ID (a folder, or a hub id in the cache) from its config and file headers.

    Exit code 0: it fits. 1: it does not, or that cannot be told; stderr says why.
    """
    logs.configure("WARNING", json_output=False)
    settings = _settings(
        model_id,
        revision,
        sharded=False,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        deterministic=deterministic,
        uds_path="",
        max_input_tokens=None,
        json_output=False,
        logger_level="WARNING",
        otlp_endpoint=None,
        otlp_service_name="",
    )
    from tgi_shard.estimate import estimate
    from tgi_shard.memory import Limits

    try:
        made = estimate(
            settings.model_path,
            dtype=settings.dtype,
            device=settings.device,
            num_ranks=num_shard,
            rope_override=settings.rope_override,
            trust_remote_code=settings.trust_remote_code,
            deterministic=settings.deterministic,
            memory_fraction=settings.memory_fraction,
            limits=Limits(max_batch_prefill_tokens, max_total_tokens or 0, max_batch_size),
        )
    except ModelError as error:
        raise _Refused(str(error)) from error
    click.echo(made.describe())
    context.exit(0 if made.problem is None else 1)


@contextmanager
def _without_collections() -> Iterator[None]:
    """For imports: nothing that they make is garbage, and the collector would walk through it many times."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _stand_by(model_id: str, revision: str | None) -> bool:
    """Import what serving takes, hold nothing, and wait. False: nobody needs this process any more."""
    from tgi_shard import hub, service  # noqa: F401  service brings almost everything
    from tgi_shard.models import registry

    with suppress(ModelError):  # the start itself will tell, if there is one
        registry.import_for(hub.locate(_hub(), model_id, revision))
    gc.collect()
    gc.freeze()  # service.serve does it again, for what comes on top
    line = sys.stdin.readline()
    if not line:
        return False
    os.environ.update(json.loads(line))
    return True


class _Refused(click.ClickException):
    """`Error: <message>` on stderr, which the launcher shows, and exit code 1."""


def _refuse(option: str, value: object) -> None:
    if value:
        raise _Refused(f"{option} {value} is not available yet.")


def _settings(
    model_id: str,
    revision: str | None,
    *,
    sharded: bool,
    dtype: str | None,
    trust_remote_code: bool,
    deterministic: bool,
    uds_path: str,
    max_input_tokens: int | None,
    json_output: bool,
    logger_level: str,
    otlp_endpoint: str | None,
    otlp_service_name: str,
) -> "Settings":
    """The options together with what the environment says of the group, the memory and the sampling."""
    if sharded:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise _Refused(f"{name} must be set when sharded is True")
    rank, world_size = _environment("RANK", int, 0), _environment("WORLD_SIZE", int, 1)
    if not sharded and world_size != 1:
        raise _Refused(f"WORLD_SIZE is {world_size}, but --sharded is not given.")
    if not 0 <= rank < world_size:
        raise _Refused(f"RANK must be between 0 and WORLD_SIZE - 1 = {world_size - 1}. Given: {rank}")
    wiggle_room = _environment("TGI_WIGGLE_ROOM", float, DEFAULT_WIGGLE_ROOM)
    if not 0 < wiggle_room < 1:
        raise _Refused(f"TGI_WIGGLE_ROOM must be greater than 0 and less than 1. Given: {wiggle_room}")
    cuda_memory_fraction = _environment("CUDA_MEMORY_FRACTION", float, 1.0)
    if not 0 < cuda_memory_fraction <= 1:
        raise _Refused(
            f"CUDA_MEMORY_FRACTION must be greater than 0 and at most 1. Given: {cuda_memory_fraction}"
        )
    rope_scaling, rope_factor = (
        _environment("ROPE_SCALING", str, None),
        _environment("ROPE_FACTOR", float, None),
    )
    if rope_scaling not in (None, "linear"):
        raise _Refused(f"ROPE_SCALING {rope_scaling} is not available yet; linear is.")
    if rope_factor is not None and rope_factor < 1:
        raise _Refused(f"ROPE_FACTOR must be at least 1. Given: {rope_factor}")
    from tgi_shard import hub  # below the checks, so that a wrong option is not answered seconds later

    try:
        model_path = hub.locate(_hub(), model_id, revision)
    except ModelError as error:
        raise _Refused(str(error)) from error

    import torch

    from tgi_shard.models.rope_override import RopeOverride
    from tgi_shard.settings import Settings, device_of

    has_rope_override = rope_scaling is not None or rope_factor is not None
    return Settings(
        model_id=model_id,
        model_path=model_path,
        revision=revision,
        rank=rank,
        world_size=world_size,
        master_addr=_environment("MASTER_ADDR", str, "localhost"),
        master_port=_environment("MASTER_PORT", int, 29500),
        uds_path=uds_path,
        dtype=None if dtype is None else getattr(torch, dtype),
        device=device_of(rank),
        trust_remote_code=trust_remote_code,
        memory_fraction=cuda_memory_fraction * wiggle_room,
        watermark_gamma=_environment("WATERMARK_GAMMA", float, 0.5),
        watermark_delta=_environment("WATERMARK_DELTA", float, 2.0),
        rope_override=RopeOverride(factor=rope_factor or 1.0) if has_rope_override else None,
        max_input_tokens=max_input_tokens,
        deterministic=deterministic,
        json_output=json_output,
        logger_level=logger_level,
        otlp_endpoint=otlp_endpoint,
        otlp_service_name=otlp_service_name,
    )


def _hub() -> "Hub":
    from huggingface_hub import constants

    from tgi_shard.hub import Hub

    token = None
    for name in ("HF_API_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):  # the first wins, as in TGI
        token = token or _environment(name, str, None)
    cache_dir = _environment("HUGGINGFACE_HUB_CACHE", Path, Path(constants.HF_HUB_CACHE))
    return Hub(cache_dir=cache_dir.expanduser(), token=token, offline=constants.HF_HUB_OFFLINE)


def _environment(name: str, parse: Callable[[str], T], default: T) -> T:
    """A variable's value; `default` where it is unset or empty."""
    value = os.environ.get(name)
    if not value:
        return default
    try:
        return parse(value)
    except ValueError as error:
        raise _Refused(f"The environment variable {name} has the invalid value {value!r}.") from error


if __name__ == "__main__":
    main()
