"""The load generator as a process, against small servers whose timing and counting are known."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import tiny_models

ROOT = Path(__file__).parents[2]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    subprocess.run(
        [sys.executable, ROOT / "bench" / "make_model.py", "tiny", folder],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return folder


@asynccontextmanager
async def serving(path: str, handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post(path, handler)
    app.router.add_get("/v1/models", _models)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def _models(_: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "the-model"}]})


async def stream(request: web.Request, events: list[tuple[float, str]]) -> web.StreamResponse:
    """(seconds to wait, bytes to send) one after the other."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for wait_s, text in events:
        await asyncio.sleep(wait_s)
        await response.write(text.encode())
    return response


async def measure(url: str, tokenizer: Path, tmp_path: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The JSON report and the printed one."""
    file = tmp_path / "report.json"
    arguments = ["--url", url, "--tokenizer", str(tokenizer), "--json", str(file), *options]
    process = await asyncio.create_subprocess_exec(
        sys.executable, ROOT / "bench" / "serve.py", *arguments, stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await asyncio.wait_for(process.communicate(), timeout=60)
    report: dict[str, Any] = json.loads(file.read_text())["report"]
    assert process.returncode == (1 if report["num_errors"] else 0)
    return report, printed.decode()


def _data(event: object) -> str:
    return f"data: {json.dumps(event)}\n\n"


async def test_tgi_route(tokenizer: Path, tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = []
    running, most = 0, 0

    async def generate(request: web.Request) -> web.StreamResponse:
        nonlocal running, most
        bodies.append(await request.json())
        running += 1
        most = max(most, running)
        count = bodies[-1]["parameters"]["max_new_tokens"]
        events = [(0.1, _data({"token": {"id": 1, "text": " a"}, "generated_text": None, "details": None}))]
        # Two tokens in one write: two events at the same moment.
        events += [(0.05, _data({"token": {"id": 1}}) * 2)] * ((count - 2) // 2)
        last = {
            "token": {"id": 1},
            "generated_text": "",
            "details": {"generated_tokens": count, "input_length": 7},
        }
        response = await stream(request, [*events, (0.05, "data:" + json.dumps(last) + "\n\n")])
        running -= 1
        return response

    async with serving("/generate_stream", generate) as url:
        options = ("--requests", "9", "--concurrency", "3", "--output-tokens", "10", "--prompt-tokens", "7")
        report, printed = await measure(url, tokenizer, tmp_path, *options)
    assert (report["num_requests"], report["num_errors"], report["num_short"]) == (9, 0, 0)
    assert report["tokens_counted_by"] == "server"
    assert report["output_tokens_per_s"] == pytest.approx(90 / report["duration_s"])
    assert report["duration_s"] > 3 * 0.35
    assert report["ttft_p50_ms"] >= 100
    assert report["time_per_output_token_ms"] == pytest.approx(
        1000 * 0.25 / 9, rel=0.5
    )  # the machine may be busy
    assert report["inter_token_p99_ms"] >= 50
    assert "tokens_per_event" in report
    assert report["tokens_per_event"] == 1.0
    assert most == 3
    assert len(bodies) == 2 + 9, "two to warm up"
    prompts = [body["inputs"] for body in bodies]
    assert len(set(prompts)) == len(prompts), "a shared prefix would measure the prefix cache"
    assert bodies[0]["parameters"]["do_sample"] is False
    assert "9 requests, 3 at a time, 7 tokens in, 10 out" in printed


@pytest.mark.parametrize("route", ["completions", "chat"])
async def test_openai_routes_with_usage(tokenizer: Path, tmp_path: Path, route: str) -> None:
    bodies: list[dict[str, Any]] = []

    async def complete(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        empty, text = [
            {"text": x, "delta": {"content": x} if x else {"role": "assistant"}} for x in ("", " ab cd")
        ]
        events = [(0.0, _data({"choices": [empty]}))]
        events += [(0.02, _data({"choices": [text]}))] * 4  # three tokens each
        usage = {"prompt_tokens": 9, "completion_tokens": 12}
        return await stream(
            request, [*events, (0.0, _data({"choices": [], "usage": usage}) + "data: [DONE]\n\n")]
        )

    path = "/v1/completions" if route == "completions" else "/v1/chat/completions"
    async with serving(path, complete) as url:
        options = (
            "--route",
            route,
            "--requests",
            "2",
            "--output-tokens",
            "12",
            "--extra-body",
            '{"ignore_eos": true}',
        )
        report, _ = await measure(url, tokenizer, tmp_path, *options)
    assert report["tokens_counted_by"] == "server"
    assert report["tokens_per_event"] == 3.0
    assert report["output_tokens_per_s"] == pytest.approx(24 / report["duration_s"])
    assert report["prompt_tokens_per_s"] == pytest.approx(18 / report["duration_s"])
    assert report["ttft_p50_ms"] >= 20, "an event without text is no token"
    assert report["num_short"] == 0
    assert bodies[0]["model"] == "the-model"
    assert (bodies[0]["ignore_eos"], bodies[0]["max_tokens"], bodies[0]["temperature"]) == (True, 12, 0.0)


async def test_without_usage_events_are_counted_and_short_replies_are_told(
    tokenizer: Path, tmp_path: Path
) -> None:
    async def complete(request: web.Request) -> web.StreamResponse:
        return await stream(request, [(0.0, _data({"choices": [{"text": "x"}]}))] * 3)

    async with serving("/v1/completions", complete) as url:
        options = ("--route", "completions", "--requests", "2", "--output-tokens", "5")
        report, printed = await measure(url, tokenizer, tmp_path, *options)
    assert (report["tokens_counted_by"], report["num_short"]) == ("events", 2)
    assert "counted by events" in printed
    assert "2 requests ended before their 5 tokens" in printed


async def test_errors_are_counted_and_shown(tokenizer: Path, tmp_path: Path) -> None:
    count = 0

    async def generate(request: web.Request) -> web.StreamResponse:
        nonlocal count
        count += 1
        if count == 1:
            return web.json_response({"error": "Model is overloaded", "error_type": "overloaded"}, status=429)
        if count == 2:
            return await stream(
                request, [(0.0, _data({"error": "Request failed", "error_type": "generation"}))]
            )
        if count == 3:  # the connection breaks off
            response = await stream(request, [(0.0, _data({"token": {"id": 1}}))])
            assert request.transport is not None
            request.transport.abort()
            return response
        return await stream(request, [(0.0, _data({"token": {"id": 1}}))])

    async with serving("/generate_stream", generate) as url:
        options = ("--requests", "4", "--output-tokens", "1", "--warmup", "0")
        report, printed = await measure(url, tokenizer, tmp_path, *options)
    assert (report["num_requests"], report["num_errors"]) == (4, 3)
    assert report["output_tokens_per_s"] == pytest.approx(1 / report["duration_s"])
    for text in ("status 429", "Model is overloaded", "Request failed", "ClientPayloadError"):
        assert text in printed


async def test_prompts_have_exactly_their_length_for_any_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    """The bench model's tokenizer, and one that adds a token of its own and splits words."""
    from tokenizers import Tokenizer

    lengths: list[int] = []
    folder = tiny_models.save("llama", tmp_path / "llama", vocab_size=402)
    spaced = json.loads((folder / "tokenizer.json").read_text())
    vocab, merges = spaced["model"]["vocab"], spaced["model"]["merges"]
    words = [a + b for a in "abcdefghijkl" for b in "mnopqrstuvwx"]
    for token in list(vocab):
        if vocab[token] > tiny_models.PAD_ID:
            del vocab[token]
    vocab |= {f"Ġ{letter}": 259 + i for i, letter in enumerate(sorted(set("".join(words))))}
    vocab |= {f"Ġ{word}": 300 + i for i, word in enumerate(words[:102])}
    merges[:] = [["Ġ", token[1]] for token in vocab if token.startswith("Ġ") and len(token) == 2]
    merges += [[token[:2], token[2]] for token in vocab if token.startswith("Ġ") and len(token) == 3]
    (folder / "tokenizer.json").write_text(json.dumps(spaced))

    async def generate(request: web.Request) -> web.StreamResponse:
        lengths.append(len(made.encode((await request.json())["inputs"]).ids))
        return await stream(request, [(0.0, _data({"token": {"id": 1}}))])

    for model in (folder, tokenizer):
        made = Tokenizer.from_file(str(model / "tokenizer.json"))
        async with serving("/generate_stream", generate) as url:
            for length in (3, 64):
                lengths.clear()
                options = ("--requests", "3", "--output-tokens", "1", "--prompt-tokens", str(length))
                await measure(url, model, tmp_path, *options)
                assert lengths == [length] * 5


def test_the_bench_model_runs_and_names_no_end(tokenizer: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(tokenizer)
    encoder = AutoTokenizer.from_pretrained(tokenizer)
    assert model.config.eos_token_id is None
    assert model.generation_config.eos_token_id is None
    ids = encoder(" abc abd", return_tensors="pt")["input_ids"]
    assert len(model.generate(ids, max_new_tokens=200)[0]) == ids.shape[1] + 200
