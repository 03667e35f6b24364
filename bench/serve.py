"""Puts a load on a running server, and tells tokens a second, time to first token, time between tokens.

    python bench/serve.py --url http://127.0.0.1:3000 --tokenizer /tmp/bench-model --concurrency 32 --requests
    96

A closed loop: `--concurrency` clients, each sends its next request when the last one has ended, until
`--requests` have been sent. Each prompt is different (no prefix to share) and has exactly `--prompt-tokens`
tokens. While the load runs the client only notes when which bytes came; they are read afterwards, so that it
takes little of the processor it shares with the server. See README.md for the routes, for how tokens are
counted, and for what the numbers mean.
"""

import argparse
import asyncio
import json
import random
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp
from tokenizers import Tokenizer

Route = Literal["generate", "completions", "chat"]
ROUTES: tuple[Route, ...] = ("generate", "completions", "chat")
PATHS: dict[Route, str] = {
    "generate": "/generate_stream",
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
}


@dataclass(frozen=True, slots=True)
class Load:
    url: str
    route: Route
    tokenizer: Path
    model: str | None = None  # OpenAI routes; None: the first of /v1/models
    concurrency: int = 1
    num_requests: int = 16
    num_warmup: int = 2  # requests before the clock starts, one after the other
    prompt_tokens: int = 128
    output_tokens: int = 128
    seed: int = 0
    timeout_s: float = 600.0
    extra_body: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """One request. Times are seconds on one clock; `token_times` has an entry for each event with text."""

    sent_at: float
    ended_at: float
    token_times: list[float]
    num_output_tokens: int
    num_prompt_tokens: int | None  # as the server counts them; None if it does not say
    is_counted_by_server: bool
    error: str | None


@dataclass(frozen=True, slots=True)
class Report:
    num_requests: int
    num_errors: int
    num_short: int  # ended before they had all their tokens
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    inter_token_p50_ms: float | None  # between events of a stream
    inter_token_p99_ms: float | None
    time_per_output_token_ms: float | None  # a request's, after its first token; the median of all requests
    latency_p50_ms: float | None
    latency_p99_ms: float | None
    tokens_per_event: float | None
    tokens_counted_by: Literal["server", "events"]
    client_cpu: float  # of one core, while the load ran
    errors: list[str]  # the first few different ones


def main() -> None:
    load, json_file = _parse(sys.argv[1:])
    report = run(load)
    print(describe(load, report))
    if json_file is not None:
        json_file.write_text(json.dumps({"load": _plain(load), "report": asdict(report)}, indent=2) + "\n")
    if report.num_errors:
        sys.exit(1)


def run(load: Load) -> Report:
    """Put the load on the server and wait for its end."""
    total = load.num_warmup + load.num_requests
    prompts = make_prompts(load.tokenizer, load.prompt_tokens, total, load.seed)
    return asyncio.run(_run(load, prompts))


async def _run(load: Load, prompts: list[str]) -> Report:
    timeout = aiohttp.ClientTimeout(total=load.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(load.url, timeout=timeout, connector=connector) as session:
        model = load.model or (await _first_model(session) if load.route != "generate" else "")
        bodies = [json.dumps(request_body(load, model, prompt)).encode() for prompt in prompts]
        for body in bodies[: load.num_warmup]:
            reply = read_reply(await _send(session, load, body), load.route)
            if reply.error is not None:
                sys.exit(f"A warm-up request failed: {reply.error}")
        waiting = iter(bodies[load.num_warmup :])
        exchanges: list[Exchange] = []

        async def client() -> None:
            for body in waiting:
                exchanges.append(await _send(session, load, body))

        started, cpu_started = time.perf_counter(), _cpu_seconds()
        await asyncio.gather(*(client() for _ in range(load.concurrency)))
        duration, cpu = time.perf_counter() - started, _cpu_seconds() - cpu_started
    replies = [read_reply(exchange, load.route) for exchange in exchanges]
    return summarize(replies, load, duration, cpu / duration)


@dataclass(slots=True)
class Exchange:
    """A request and the bytes of its reply as they came in."""

    sent_at: float
    ended_at: float = 0.0
    status: int | None = None
    chunks: list[tuple[float, bytes]] = field(default_factory=list)
    failure: str | None = None


async def _send(session: aiohttp.ClientSession, load: Load, body: bytes) -> Exchange:
    exchange = Exchange(sent_at=time.perf_counter())
    headers = {"Content-Type": "application/json"}
    try:
        async with session.post(PATHS[load.route], data=body, headers=headers) as response:
            exchange.status = response.status
            async for chunk in response.content.iter_any():
                exchange.chunks.append((time.perf_counter(), chunk))
    except (aiohttp.ClientError, TimeoutError) as error:
        exchange.failure = f"{type(error).__name__}: {error}"
    exchange.ended_at = time.perf_counter()
    return exchange


async def _first_model(session: aiohttp.ClientSession) -> str:
    async with session.get("/v1/models") as response:
        response.raise_for_status()
        name: str = (await response.json())["data"][0]["id"]
        return name


def request_body(load: Load, model: str, prompt: str) -> dict[str, Any]:
    """Greedy, streamed, `output_tokens` long."""
    body: dict[str, Any]
    if load.route == "generate":
        parameters = {"max_new_tokens": load.output_tokens, "do_sample": False, "details": True}
        return {"inputs": prompt, "parameters": parameters | load.extra_body}
    if load.route == "completions":
        body = {"prompt": prompt, "max_tokens": load.output_tokens}
    else:
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": load.output_tokens}
    options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0.0}
    return body | {"model": model} | options | load.extra_body


def make_prompts(tokenizer_folder: Path, num_tokens: int, count: int, seed: int) -> list[str]:
    """Different texts of exactly `num_tokens` tokens each, the tokenizer's own special tokens included."""
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.no_truncation()
    words = sorted(
        word
        for token in tokenizer.get_vocab()
        if token.startswith(("Ġ", "▁")) and (word := token[1:]).isascii() and word.isalpha()
    )
    if len(words) < 26:
        sys.exit(f"The tokenizer in {tokenizer_folder} has too few whole words to build prompts of.")
    draw = random.Random(seed)
    return [_prompt(tokenizer, words, num_tokens, draw) for _ in range(count)]


def _prompt(tokenizer: Tokenizer, words: list[str], num_tokens: int, draw: random.Random) -> str:
    chosen = [draw.choice(words) for _ in range(num_tokens)]
    for _ in range(10 * num_tokens + 100):
        # A space in front: then the first word is encoded like the others.
        text = " " + " ".join(chosen)
        surplus = len(tokenizer.encode(text).ids) - num_tokens
        if surplus == 0:
            return text
        if surplus > 0:
            chosen = chosen[: max(1, len(chosen) - surplus)]
            if len(chosen) == 1:
                chosen = [draw.choice(words)]
        else:
            chosen += [draw.choice(words) for _ in range(-surplus)]
    sys.exit(f"No text of exactly {num_tokens} tokens was found for this tokenizer.")


def read_reply(exchange: Exchange, route: Route) -> Reply:
    """The events of a stream. Raises nothing: what is wrong with it becomes the reply's error."""
    token_times: list[float] = []
    num_output_tokens = num_prompt_tokens = None
    error = exchange.failure
    if error is None and exchange.status != 200:
        error = f"status {exchange.status}: {b''.join(chunk for _, chunk in exchange.chunks)[:300]!r}"
    if error is None:
        for at, payload in _events(exchange.chunks):
            if payload == b"[DONE]":
                break
            event = json.loads(payload)
            if event.get("error"):
                error = str(event["error"])
                break
            if _has_text(event, route):
                token_times.append(at)
            if (details := event.get("details")) is not None:
                num_output_tokens = details["generated_tokens"]
                num_prompt_tokens = details.get("input_length")
            if (usage := event.get("usage")) is not None:
                num_output_tokens, num_prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
        if error is None and not token_times:
            error = "the stream held no token"
    return Reply(
        sent_at=exchange.sent_at,
        ended_at=exchange.ended_at,
        token_times=token_times,
        num_output_tokens=len(token_times) if num_output_tokens is None else num_output_tokens,
        num_prompt_tokens=num_prompt_tokens,
        is_counted_by_server=num_output_tokens is not None,
        error=error,
    )


def _events(chunks: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Server-sent events: the time at which each was complete, and its data."""
    rest = b""
    for at, chunk in chunks:
        *events, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    yield at, line[5:].strip()


def _has_text(event: dict[str, Any], route: Route) -> bool:
    if route == "generate":
        return event.get("token") is not None
    choices = event.get("choices")
    if not choices:
        return False
    return bool(choices[0]["text"] if route == "completions" else choices[0]["delta"].get("content"))


def summarize(replies: list[Reply], load: Load, duration_s: float, client_cpu: float) -> Report:
    good = [reply for reply in replies if reply.error is None]
    num_output_tokens = sum(reply.num_output_tokens for reply in good)
    num_prompt_tokens = sum(reply.num_prompt_tokens or load.prompt_tokens for reply in good)
    ttft = [reply.token_times[0] - reply.sent_at for reply in good]
    gaps = [
        later - earlier
        for reply in good
        for earlier, later in zip(reply.token_times, reply.token_times[1:], strict=False)
    ]
    per_token = [
        (reply.token_times[-1] - reply.token_times[0]) / (reply.num_output_tokens - 1)
        for reply in good
        if reply.num_output_tokens > 1
    ]
    latency = [reply.ended_at - reply.sent_at for reply in good]
    num_events = sum(len(reply.token_times) for reply in good)
    errors = [reply.error for reply in replies if reply.error is not None]
    return Report(
        num_requests=len(replies),
        num_errors=len(errors),
        num_short=sum(reply.num_output_tokens < load.output_tokens for reply in good),
        duration_s=duration_s,
        requests_per_s=len(good) / duration_s,
        output_tokens_per_s=num_output_tokens / duration_s,
        prompt_tokens_per_s=num_prompt_tokens / duration_s,
        ttft_p50_ms=percentile_ms(ttft, 50),
        ttft_p99_ms=percentile_ms(ttft, 99),
        inter_token_p50_ms=percentile_ms(gaps, 50),
        inter_token_p99_ms=percentile_ms(gaps, 99),
        time_per_output_token_ms=1000 * statistics.median(per_token) if per_token else None,
        latency_p50_ms=percentile_ms(latency, 50),
        latency_p99_ms=percentile_ms(latency, 99),
        tokens_per_event=num_output_tokens / num_events if num_events else None,
        tokens_counted_by="server" if all(reply.is_counted_by_server for reply in good) else "events",
        client_cpu=client_cpu,
        errors=list(dict.fromkeys(errors))[:5],
    )


def percentile_ms(seconds: list[float], percent: float) -> float | None:
    """Linear between the two nearest of the sorted values."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return 1000 * (ordered[below] + (ordered[above] - ordered[below]) * (place - below))


def describe(load: Load, report: Report) -> str:
    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} ms"

    counted = (
        "" if report.tokens_counted_by == "server" else "  (counted by events: the server does not tell)"
    )
    lines = [
        f"{load.url}{PATHS[load.route]}: {report.num_requests} requests, {load.concurrency} at a time, "
        f"{load.prompt_tokens} tokens in, {load.output_tokens} out",
        f"  requests        {report.requests_per_s:9.2f} /s in {report.duration_s:.1f} s",
        f"  output tokens   {report.output_tokens_per_s:9.1f} /s{counted}",
        f"  first token     {ms(report.ttft_p50_ms)} p50, {ms(report.ttft_p99_ms)} p99",
        f"  between events  {ms(report.inter_token_p50_ms)} p50, {ms(report.inter_token_p99_ms)} p99"
        + (f", {report.tokens_per_event:.2f} tokens an event" if report.tokens_per_event else ""),
        f"  per token       {ms(report.time_per_output_token_ms)} median of the requests",
        f"  whole request   {ms(report.latency_p50_ms)} p50, {ms(report.latency_p99_ms)} p99",
        f"  client          {100 * report.client_cpu:.0f}% of a core",
        f"  errors          {report.num_errors}" + "".join(f"\n    {error}" for error in report.errors),
    ]
    if report.num_short:
        lines.append(
            f"  {report.num_short} requests ended before their {load.output_tokens} tokens: the rates are not"
        )
        lines.append("  comparable. Take a model without an end-of-sequence token (make_model.py).")
    return "\n".join(lines)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _plain(load: Load) -> dict[str, Any]:
    return asdict(load) | {"tokenizer": str(load.tokenizer)}


def _parse(arguments: list[str]) -> tuple[Load, Path | None]:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:3000", help="where the server listens")
    parser.add_argument(
        "--route", choices=ROUTES, default="generate", help=", ".join(f"{r}: {PATHS[r]}" for r in ROUTES)
    )
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="model folder with the tokenizer.json for the prompts"
    )
    parser.add_argument(
        "--model", help="name of the model on the OpenAI routes; the first of /v1/models if not given"
    )
    parser.add_argument("--concurrency", type=int, default=1, help="clients, each with one request at a time")
    parser.add_argument("--requests", type=int, default=16, dest="num_requests", help="how many are measured")
    parser.add_argument("--warmup", type=int, default=2, dest="num_warmup", help="how many are sent before")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="chooses the prompts")
    parser.add_argument(
        "--timeout", type=float, default=600.0, dest="timeout_s", help="for one request, in seconds"
    )
    parser.add_argument(
        "--extra-body",
        type=json.loads,
        default={},
        help="JSON fields to add to each request: '{\"ignore_eos\": true}'",
    )
    parser.add_argument("--json", type=Path, dest="json_file", help="write the report to this file as well")
    options = vars(parser.parse_args(arguments))
    json_file: Path | None = options.pop("json_file")
    return Load(**options), json_file


if __name__ == "__main__":
    main()
