"""The command `text-generation-router`: its options, from command line or environment, as Settings."""

import asyncio
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import structlog
import uvloop

from tgi_router import app, logs
from tgi_router.settings import Settings
from tgi_router.text import reasoning
from tgi_router.text.tokenizer import TokenizerUnavailable
from tgi_router.text.tool_parsers import registry

log = structlog.get_logger(__name__)

Command = Callable[..., None]

COUNT = click.IntRange(1, 2**32 - 1)  # as many as a message to the shards can tell
LIMIT = click.IntRange(0, 2**32 - 1)
PORT = click.IntRange(0, 65535)


class RoutePath(click.ParamType[str]):
    """An absolute path, to be taken literally."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not str(value).startswith("/") or set("{}?#") & set(str(value)):
            self.fail(f"{value!r} is not the path of a route.", param, ctx)
        return str(value)


NOT_USED = "Accepted for TGI's command line; "


def option(
    flag: str, help_text: str, *, short: str | None = None, **kwargs: Any
) -> Callable[[Command], Command]:
    """An option that also reads the environment variable of its name, and shows its default."""
    name = flag.split("/")[0].removeprefix("--")
    flags = (flag, short) if short else (flag,)
    return click.option(
        *flags,
        help=help_text,
        envvar=name.replace("-", "_").upper(),
        show_envvar=True,
        show_default=True,
        **kwargs,
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(
    version("text-generation-server"), "-V", "--version", message="text-generation-router %(version)s"
)
@option("--hostname", "IP address to listen on; 0.0.0.0 if it is none.", default="0.0.0.0")
@option("--port", "Port to listen on; bound once the model is ready.", short="-p", type=PORT, default=3000)
@option("--prometheus-port", "A second port that serves /metrics.", type=PORT, default=9000)
@option(
    "--master-shard-uds-path",
    "Unix socket of the shard with rank 0; the others' end in -1, -2 and so on.",
    default="/tmp/text-generation-server-0",
)
@option(
    "--tokenizer-name",
    "Folder of the model: tokenizer and chat template are read from it.",
    default="bigscience/bloom",
)
@option(
    "--served-model-name", "What /info and the OpenAI routes call the model. Default: the tokenizer name."
)
@option(
    "--tokenizer-config-path",
    "File to read instead of the model's tokenizer_config.json; its chat template wins.",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@option(
    "--max-concurrent-requests",
    "Generations under way at a time; beyond it clients get 429.",
    type=LIMIT,
    default=128,
)
@option(
    "--max-queue-time",
    "Seconds that a request may wait before it is first scheduled; then its client gets 429. Default: no "
    "limit.",
    type=COUNT,
)
@option("--max-best-of", "Largest `best_of`.", type=LIMIT, default=2)
@option("--max-stop-sequences", "Most stop sequences in a request.", type=LIMIT, default=4)
@option("--max-top-n-tokens", "Largest `top_n_tokens`.", type=LIMIT, default=5)
@option(
    "--max-input-tokens", "Longest prompt in tokens. Default: one less than the maximum in total.", type=COUNT
)
@option(
    "--max-total-tokens",
    "Longest prompt and answer together. Default: what model and memory allow.",
    type=COUNT,
)
@option("--max-client-batch-size", "Most prompts in one /v1/completions body.", type=LIMIT, default=4)
@option("--payload-limit", "Largest body in bytes.", type=COUNT, default=2_000_000)
@option("--max-batch-prefill-tokens", "Most tokens in one step.", type=COUNT, default=4096)
@option(
    "--max-batch-total-tokens", "Caps the tokens in the KV cache. Default: what fits into memory.", type=COUNT
)
@option("--max-batch-size", "Most sequences in one step. Default: --max-concurrent-requests.", type=COUNT)
@option(
    "--prefix-caching/--no-prefix-caching", "Share the KV cache of prompts that begin alike.", default=True
)
@option(
    "--stall-timeout",
    "Seconds after which a step that has no result counts as stalled in /health; never less than ten times "
    "the longest step so far.",
    type=COUNT,
    default=60,
)
@option("--validation-workers", "Tokenizer threads.", type=COUNT, default=2)
@option(
    "--enable-prefill-logprobs",
    "Give prompt logprobs with `decoder_input_details`.",
    is_flag=True,
    default=False,
)
@option(
    "--cors-allow-origin", "Origin that browsers may call from; may be repeated. Default: any.", multiple=True
)
@option("--api-key", "Key that requests must carry: `Authorization: Bearer <key>`.")
@option(
    "--tool-call-parser",
    "How the model writes calls of tools. Default: as its chat template shows.",
    type=click.Choice(registry.FORMATS),
)
@option(
    "--reasoning-parser",
    "How the model writes its thoughts, which then come as `reasoning_content`; auto: as its chat template "
    "shows. Default: they stay content.",
    type=click.Choice([*reasoning.FORMATS, "auto"]),
)
@option("--aip-predict-route", "A further path of /vertex, chosen by Vertex AI.", type=RoutePath())
@option("--aip-health-route", "A further path of /health, chosen by Vertex AI.", type=RoutePath())
@option("--aip-http-port", "Wins over --port; chosen by Vertex AI.", type=PORT)
@option("--json-output", "Log lines as JSON.", is_flag=True, default=False)
@option(
    "--disable-grammar-support",
    "Refuse grammars, and with them calls of tools that are forced.",
    is_flag=True,
    default=False,
)
@option(
    "--waiting-served-ratio", NOT_USED + "prompts never pause running sequences.", type=float, default=1.2
)
@option("--max-waiting-tokens", NOT_USED + "prompts never pause running sequences.", type=int, default=20)
@option("--revision", NOT_USED + "the folder given as tokenizer name has one revision.")
@option(
    "--trust-remote-code", NOT_USED + "the router runs no code of the model.", is_flag=True, default=False
)
@option(
    "--usage-stats",
    NOT_USED + "nothing is ever reported.",
    type=click.Choice(["on", "off", "no-stack"]),
    default="on",
)
@option("--max-image-fetch-size", NOT_USED + "images are not fetched yet.", type=LIMIT, default=1 << 30)
@option("--otlp-endpoint", "Collector that gets traces over OTLP/gRPC: http://host:4317.")
@option("--otlp-service-name", "Name in traces.", default="text-generation-inference.router")
@option("--ngrok", "Not available.", is_flag=True, default=False)
@option("--ngrok-authtoken", "Not available.")
@option("--ngrok-edge", "Not available.")
@click.argument("command", required=False, type=click.Choice(["print-schema"]))
def main(command: str | None, **options: Any) -> None:
    """HTTP in front of the model's shards: checks, schedules and streams.

    `print-schema` prints the OpenAPI document instead of serving.
    """
    if command == "print-schema":
        click.echo(app.schema(settings_from(options)))
        return
    for name in ("ngrok",):
        if options[name]:
            raise click.UsageError(f"not available yet: --{name.replace('_', '-')}")
    settings = settings_from(options)
    logs.configure(
        logs.level_from(settings.log_level), json_output=settings.json_output, colors=settings.log_colors
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(app.serve(settings))
        except (app.StartError, TokenizerUnavailable) as error:
            log.error(str(error))
            sys.exit(1)


def settings_from(options: dict[str, Any]) -> Settings:
    return Settings(
        hostname=options["hostname"],
        port=options["aip_http_port"] or options["port"],
        prometheus_port=options["prometheus_port"],
        master_shard_uds_path=options["master_shard_uds_path"],
        tokenizer_path=Path(options["tokenizer_name"]),
        served_model_name=options["served_model_name"] or options["tokenizer_name"],
        tokenizer_config_path=options["tokenizer_config_path"],
        max_concurrent_requests=options["max_concurrent_requests"],
        max_queue_time_s=options["max_queue_time"],
        max_best_of=options["max_best_of"],
        max_stop_sequences=options["max_stop_sequences"],
        max_top_n_tokens=options["max_top_n_tokens"],
        max_input_tokens=options["max_input_tokens"],
        max_total_tokens=options["max_total_tokens"],
        max_client_batch_size=options["max_client_batch_size"],
        payload_limit=options["payload_limit"],
        max_batch_prefill_tokens=options["max_batch_prefill_tokens"],
        max_batch_total_tokens=options["max_batch_total_tokens"],
        max_batch_size=options["max_batch_size"],
        prefix_caching=options["prefix_caching"],
        stall_timeout_s=options["stall_timeout"],
        validation_workers=options["validation_workers"],
        enable_prefill_logprobs=options["enable_prefill_logprobs"],
        grammars=not options["disable_grammar_support"],
        cors_allow_origin=options["cors_allow_origin"],
        api_key=options["api_key"],
        vertex_predict_path=options["aip_predict_route"],
        vertex_health_path=options["aip_health_route"],
        compute_type=os.environ.get("COMPUTE_TYPE", "gpu+optimized"),
        docker_label=os.environ.get("DOCKER_LABEL"),
        git_sha=os.environ.get("GIT_SHA"),
        tool_call_parser=options["tool_call_parser"],
        reasoning_parser=options["reasoning_parser"],
        otlp_endpoint=options["otlp_endpoint"],
        otlp_service_name=options["otlp_service_name"],
        json_output=options["json_output"],
        log_level=os.environ.get("LOG_LEVEL", "info"),
        log_colors=os.environ.get("LOG_COLORIZE", "") in ("1", "true"),
    )
