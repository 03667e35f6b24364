"""The launcher's options: every one once, as a row that says what it is and who receives it.

A row is a field of `Options`. Its name gives the flag (`--max-input-tokens`) and the environment variable
(`MAX_INPUT_TOKENS`; the flag wins), its annotation gives the type, and `option(...)` the rest, with the
receivers: the flag, or the variable, in which the download step, the shards and the router get the value.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

PROGRAM = "text-generation-launcher"

Receiver = Literal["download", "shard", "router"]

COUNT = click.IntRange(0, 2**32 - 1)  # as many as a message to the shards can tell
POSITIVE = click.IntRange(1, 2**32 - 1)
FILE = click.Path(exists=True, dir_okay=False)
PORT = click.IntRange(min=0, max=65535)


class TrueOrFalse(click.ParamType[bool]):
    """A boolean that is spelled out: `true` or `false`, and nothing else."""

    name = "true|false"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        if value not in (True, False, "true", "false"):
            self.fail(f"{value!r} is not one of 'true', 'false'.", param, ctx)
        return value in (True, "true")


class IntList(click.ParamType[tuple[int, ...]]):
    """Comma separated whole numbers."""

    name = "n,n,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a comma separated list of whole numbers.", param, ctx)


@dataclass(frozen=True, slots=True)
class Row:
    """What the table says of an option beside its name, its type and its default."""

    help: str
    short: str | None
    type: click.ParamType[Any] | None  # None: follows from the annotation
    flags: Mapping[Receiver, str]  # passed on as this flag
    variables: Mapping[Receiver, str]  # passed on in this environment variable
    true_as: str  # what a switch writes into its variables
    has_variable: bool  # the launcher itself reads it from the environment
    is_secret: bool  # never logged


def option(
    help: str,
    *,
    default: object = None,
    short: str | None = None,
    type: click.ParamType[Any] | None = None,
    download: str | None = None,
    shard: str | None = None,
    router: str | None = None,
    download_env: str | None = None,
    shard_env: str | None = None,
    router_env: str | None = None,
    true_as: str = "1",
    has_variable: bool = True,
    is_secret: bool = False,
) -> Any:  # a dataclasses.Field, which stands in the class body as the default of a typed field
    flags: dict[Receiver, str | None] = {"download": download, "shard": shard, "router": router}
    variables: dict[Receiver, str | None] = {
        "download": download_env,
        "shard": shard_env,
        "router": router_env,
    }
    row = Row(
        help=help,
        short=short,
        type=type,
        flags={receiver: flag for receiver, flag in flags.items() if flag},
        variables={receiver: variable for receiver, variable in variables.items() if variable},
        true_as=true_as,
        has_variable=has_variable,
        is_secret=is_secret,
    )
    return dataclasses.field(default=default, metadata={"row": row})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the person asked for. None: not given, the plan or the shards decide."""

    model_id: str = option(
        "Hub id, local folder, or `demo` for the model that comes with this server.",
        default="bigscience/bloom-560m",
        router="--tokenizer-name",
    )
    revision: str | None = option(
        "Commit, branch, tag or refs/pr/N on the hub; without meaning for a local folder.",
        download="--revision",
        shard="--revision",
        router="--revision",
    )
    validation_workers: int = option(
        "Tokenizer worker threads of the router.", default=2, type=COUNT, router="--validation-workers"
    )
    sharded: bool | None = option(
        "Whether to shard the model over several devices. `true` alone takes all visible devices.",
        type=TrueOrFalse(),
    )
    num_shard: int | None = option(
        "Number of shards: one process for each, on its own GPU or on its part of the CPU's cores. "
        "Unset: as many as CUDA_VISIBLE_DEVICES or NVIDIA_VISIBLE_DEVICES name, else 1.",
        type=COUNT,
    )
    quantize: (
        Literal[
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
        ]
        | None
    ) = option("Quantization method. Not available yet.")
    speculate: int | None = option(
        "Number of tokens to guess ahead. Not available yet: only 0 is taken.", type=COUNT
    )
    dtype: Literal["float16", "bfloat16", "float32"] | None = option(
        "Type of the weights and activations. Unset: the checkpoint's own.", shard="--dtype"
    )
    kv_cache_dtype: Literal["fp8_e4m3fn", "fp8_e5m2"] | None = option(
        "Type of the KV cache. Not available yet."
    )
    deterministic: bool = option(
        "Answers that are equal bit for bit, tokens and logprobs, whatever else is served, however prompts "
        "are cut, and through the death of shards; slower.",
        default=False,
        shard="--deterministic",
    )
    trust_remote_code: bool = option(
        "Run Python code that comes with the model.",
        default=False,
        download="--trust-remote-code",
        shard="--trust-remote-code",
        router="--trust-remote-code",
    )
    max_concurrent_requests: int = option(
        "Requests served at a time; more are refused with 429.",
        default=128,
        type=COUNT,
        router="--max-concurrent-requests",
    )
    max_queue_time: int | None = option(
        "Seconds that a request may wait before it is first scheduled; then it is refused with 429. Unset: "
        "no limit.",
        type=POSITIVE,
        router="--max-queue-time",
    )
    max_best_of: int = option("Largest `best_of`.", default=2, type=COUNT, router="--max-best-of")
    max_stop_sequences: int = option(
        "Most stop sequences in a request.", default=4, type=COUNT, router="--max-stop-sequences"
    )
    max_top_n_tokens: int = option(
        "Largest `top_n_tokens`.", default=5, type=COUNT, router="--max-top-n-tokens"
    )
    max_input_tokens: int | None = option(
        "Longest prompt, in tokens. Unset: what the model and the memory allow.",
        type=POSITIVE,
        shard="--max-input-tokens",
        router="--max-input-tokens",
    )
    max_input_length: int | None = option("Old name of --max-input-tokens.", type=POSITIVE)
    max_total_tokens: int | None = option(
        "Longest prompt and answer together, in tokens. Unset: what the model and the memory allow.",
        type=POSITIVE,
        router="--max-total-tokens",
        shard_env="MAX_TOTAL_TOKENS",
    )
    waiting_served_ratio: float = option(
        "No meaning here: prompts are processed in chunks beside the running streams.",
        default=0.3,
        router="--waiting-served-ratio",
    )
    max_batch_prefill_tokens: int | None = option(
        "Tokens processed in one step, at most. Unset: from the model and the GPU; 512 on a CPU.",
        type=COUNT,
        router="--max-batch-prefill-tokens",
    )
    max_batch_total_tokens: int | None = option(
        "Tokens in the KV cache, at most. Unset: what fits in memory.",
        type=POSITIVE,
        router="--max-batch-total-tokens",
    )
    max_waiting_tokens: int = option(
        "No meaning here: prompts are processed in chunks beside the running streams.",
        default=20,
        type=COUNT,
        router="--max-waiting-tokens",
    )
    max_batch_size: int | None = option(
        "Sequences in one step, at most.", type=COUNT, router="--max-batch-size", shard_env="MAX_BATCH_SIZE"
    )
    cuda_graphs: tuple[int, ...] | None = option(
        "Batch sizes to capture as CUDA graphs. Not available yet: only 0 is taken.", type=IntList()
    )
    hostname: str = option(
        "IP address to listen on; what is no IP address means 0.0.0.0.",
        default="0.0.0.0",
        router="--hostname",
    )
    port: int = option("Port to listen on.", default=3000, short="-p", type=PORT, router="--port")
    aip_http_port: int | None = option(
        "Wins over --port; set by Vertex AI, as the variables AIP_PREDICT_ROUTE and AIP_HEALTH_ROUTE are, "
        "which the router reads.",
        type=PORT,
        router="--aip-http-port",
    )
    prometheus_port: int = option(
        "Second port that serves /metrics, beside the main one.",
        default=9000,
        type=PORT,
        router="--prometheus-port",
    )
    shard_uds_path: str = option(
        "Prefix of the shards' Unix sockets; -{rank} is appended. When another launcher has the default, "
        "a private temporary directory is used.",
        default="/tmp/text-generation-server",
    )
    master_addr: str = option("Address at which the shards find one another.", default="localhost")
    master_port: int = option(
        "Port at which the shards find one another. When the default is busy, a free one is used.",
        default=29500,
        type=PORT,
    )
    huggingface_hub_cache: str | None = option(
        "Folder of the hub cache.",
        download_env="HUGGINGFACE_HUB_CACHE",
        shard_env="HUGGINGFACE_HUB_CACHE",
    )
    weights_cache_override: str | None = option(
        "Folder to take the weight files from, instead of the hub cache.",
        download_env="WEIGHTS_CACHE_OVERRIDE",
        shard_env="WEIGHTS_CACHE_OVERRIDE",
    )
    disable_custom_kernels: bool = option(
        "No meaning here: no model depends on kernels of its own.",
        default=False,
        shard_env="DISABLE_CUSTOM_KERNELS",
        true_as="True",
    )
    cuda_memory_fraction: float = option(
        "Part of the GPU's memory to use.", default=1.0, shard_env="CUDA_MEMORY_FRACTION"
    )
    rope_scaling: Literal["linear", "dynamic"] | None = option(
        "Replaces the checkpoint's RoPE scaling. `dynamic` is not available yet.", shard_env="ROPE_SCALING"
    )
    rope_factor: float | None = option(
        "Factor of the RoPE scaling; alone it implies `linear`.", shard_env="ROPE_FACTOR"
    )
    tool_call_parser: Literal["hermes", "llama3_json", "mistral", "pythonic"] | None = option(
        "How the model writes calls of tools. Unset: as its chat template shows.", router="--tool-call-parser"
    )
    reasoning_parser: Literal["deepseek_r1", "qwen3", "auto"] | None = option(
        "How the model writes its thoughts, which then come as `reasoning_content`; auto: as its chat "
        "template shows. Unset: they stay content.",
        router="--reasoning-parser",
    )
    json_output: bool = option("Logs as JSON lines.", default=False, router="--json-output")
    otlp_endpoint: str | None = option(
        "OpenTelemetry collector that gets traces over OTLP/gRPC: http://host:4317. Needs the extra [otel].",
        shard="--otlp-endpoint",
        router="--otlp-endpoint",
    )
    otlp_service_name: str = option(
        "Service name in traces, of the router and of the shards.",
        default="text-generation-inference.router",
        shard="--otlp-service-name",
        router="--otlp-service-name",
    )
    cors_allow_origin: tuple[str, ...] = option(
        "Origin that browsers may call from; may be repeated. Unset: any.",
        default=(),
        router="--cors-allow-origin",
    )
    api_key: str | None = option(
        "Key that clients must send: `Authorization: Bearer <key>`.",
        router_env="API_KEY",  # not a flag: a command line is there for every user of the machine to read
        is_secret=True,
    )
    watermark_gamma: float | None = option(
        "Fraction of the vocabulary that watermarking favours (shards: 0.5).", shard_env="WATERMARK_GAMMA"
    )
    watermark_delta: float | None = option(
        "How much watermarking favours it (shards: 2.0).", shard_env="WATERMARK_DELTA"
    )
    ngrok: bool = option("Tunnel through ngrok. Not available.", default=False)
    ngrok_authtoken: str | None = option("Token for --ngrok. Not available.", is_secret=True)
    ngrok_edge: str | None = option("Edge for --ngrok. Not available.")
    tokenizer_config_path: str | None = option(
        "File to read instead of the model's tokenizer_config.json (chat template).",
        type=FILE,
        router="--tokenizer-config-path",
    )
    disable_grammar_support: bool = option(
        "Refuse requests with a grammar.", default=False, router="--disable-grammar-support"
    )
    env: bool = option(
        "Log the runtime environment, then go on.", default=False, short="-e", has_variable=False
    )
    plan: bool = option(
        "Print what memory the model takes on this machine, without loading its weights, and end: with exit "
        "code 0 if it fits, 1 if not.",
        default=False,
        has_variable=False,
    )
    max_client_batch_size: int = option(
        "Most prompts in one /v1/completions request.",
        default=4,
        type=COUNT,
        router="--max-client-batch-size",
    )
    lora_adapters: str | None = option("LoRA adapters, comma separated. Not available yet.")
    usage_stats: Literal["on", "off", "no-stack"] = option(
        "No meaning here: nothing is ever sent to anybody.", default="on", router="--usage-stats"
    )
    payload_limit: int = option(
        "Largest request body in bytes.", default=2_000_000, type=POSITIVE, router="--payload-limit"
    )
    enable_prefill_logprobs: bool = option(
        "Let requests ask for the logprobs of their prompt.",
        default=False,
        router="--enable-prefill-logprobs",
        shard_env="REQUEST_LOGPROBS",
    )
    graceful_termination_timeout: int = option(
        "Seconds between SIGTERM and SIGKILL, for the router and for each shard.",
        default=90,
        short="-g",
        type=COUNT,
    )
    max_restarts: int = option(
        "How many times in a row the shards (or the router) are restarted before the launcher gives up. "
        "60 healthy seconds start the count anew.",
        default=10,
        type=COUNT,
    )
    standby_shards: bool = option(
        "Keep one more process for each shard, which has imported all it needs and waits to replace a lost "
        "shard. It holds no weights and no device, but some of the machine's memory.",
        default=True,
    )
    stall_timeout: int = option(
        "Seconds after which a shard or the router that does not answer is killed and restarted, and a "
        "shard whose step takes longer than that and than ten times the longest step so far.",
        default=60,
        type=POSITIVE,
        router="--stall-timeout",
    )
    given: frozenset[str] = frozenset()  # names of the options that were set, by flag or by variable


def rows() -> Iterator[tuple[str, Row]]:
    for field in dataclasses.fields(Options):
        if "row" in field.metadata:
            yield field.name, field.metadata["row"]


def forward(receiver: Receiver, values: Mapping[str, object]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The arguments and the environment variables by which `receiver` gets `values` (option name -> value).

    Nothing is passed on for None, for a switch that is off, or for a name that `values` lacks.
    """
    argv: list[str] = []
    variables: dict[str, str] = {}
    for name, row in rows():
        value = values.get(name)
        if value is None or value is False:
            continue
        if flag := row.flags.get(receiver):
            if value is True:
                argv.append(flag)
            else:
                for part in value if isinstance(value, tuple) else (value,):
                    argv += [flag, str(part)]
        if variable := row.variables.get(receiver):
            variables[variable] = row.true_as if value is True else str(value)
    return tuple(argv), variables


def describe(options: Options) -> str:
    """The options as the block that is logged at start; secrets are masked."""
    lines = ["Args {"]
    for name, row in rows():
        value = getattr(options, name)
        shown = '"***"' if row.is_secret and value is not None else _debug(value)
        lines.append(f"    {name}: {shown},")
    return "\n".join([*lines, "}"])


def _debug(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_debug, value))}]"
    return str(value)


class EnvOption(click.Option):
    """Reads its variable from the mapping at `ctx.obj`, and takes nothing empty or vague from there."""

    def value_from_envvar(self, ctx: click.Context) -> Any:
        environ: Mapping[str, str] = ctx.obj
        assert isinstance(self.envvar, str | None)
        value = environ.get(self.envvar) if self.envvar else None
        if value is None:
            return None
        if not value:
            raise click.BadParameter(f"the environment variable {self.envvar} is empty.", ctx, self)
        if self.is_flag:
            return TrueOrFalse().convert(value, self, ctx)
        return (value,) if self.multiple else value


def _parameter(name: str, row: Row, annotation: Any, default: object) -> click.Parameter:
    kind, is_repeatable = _value_type(annotation)
    flag = "--" + name.replace("_", "-")
    names = [name, flag] if row.short is None else [name, flag, row.short]
    envvar = name.upper() if row.has_variable else None
    if annotation is bool:
        if default is True:
            names[1] += "/--no-" + name.replace("_", "-")
        return EnvOption(
            names,
            is_flag=True,
            default=default,
            help=row.help,
            envvar=envvar,
            show_envvar=True,
            show_default=default is True,
        )
    return EnvOption(
        names,
        type=row.type or kind,
        default=None if is_repeatable and row.type is None else default,
        multiple=is_repeatable and row.type is None,
        help=row.help,
        envvar=envvar,
        show_envvar=True,
        show_default=default is not None,
    )


def _value_type(annotation: Any) -> tuple[click.ParamType[Any], bool]:
    """The click type of a field's annotation, and whether the option may be repeated."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    if type(None) in get_args(annotation):
        annotation = kinds[0]
    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation)), False
    if get_origin(annotation) is tuple:
        return _value_type(get_args(annotation)[0])[0], True
    simple: dict[Any, click.ParamType[Any]] = {str: click.STRING, int: click.INT, float: click.FLOAT}
    return simple.get(annotation, click.STRING), False


def command() -> click.Command:
    types = get_type_hints(Options)
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    parameters = [_parameter(name, row, types[name], defaults[name]) for name, row in rows()]
    parameters.append(
        click.Option(
            ["--version", "-V"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            help="Show the version and exit.",
            callback=_show_version,
        )
    )
    return click.Command(
        PROGRAM,
        params=parameters,
        help="Serve a language model: fetch its weights, start and watch its shards and the web server.",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )


def _show_version(context: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if is_asked:
        click.echo(f"{PROGRAM} {version('text-generation-server')}")
        context.exit()


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """Raises what click raises: UsageError (exit code 2), Exit for --help and --version (exit code 0)."""
    context = command().make_context(PROGRAM, list(argv), obj=environ)
    from_outside = (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.ENVIRONMENT)
    given = {name for name in context.params if context.get_parameter_source(name) in from_outside}
    return Options(**context.params, given=frozenset(given))
