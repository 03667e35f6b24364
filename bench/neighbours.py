"""What a stream feels of its neighbours: the gaps between its tokens alone, and while others ask for much.

    text-generation-launcher --model-id demo --hostname 127.0.0.1 --port 3000 --max-total-tokens 2000
    python bench/neighbours.py --url http://127.0.0.1:3000 --tokenizer demo/tgi_demo/model

Three situations take turns, each for a few seconds: one stream alone; the same while a client posts grammars
that are invalid or would keep a compiler busy for hours, one after the other; the same while a client posts
prompts of 1,000 tokens that are tokenised and validated, and then refused for their length, so that the model
has no part in it. Ratios compare the gaps with those of the stream alone.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from serve import make_prompts

STREAM_TOKENS = 400
MAX_NEW_TOKENS = 1024  # too many behind 1,000 where --max-total-tokens is 2000


@dataclass
class Situation:
    name: str
    bodies: Iterator[dict[str, Any]] | None  # what the other client posts to /generate, one after the other
    gaps_ms: list[float] = field(default_factory=list)
    answers_ms: list[float] = field(default_factory=list)  # how long the other client waited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:3000")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the served model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each situation in each round")
    arguments = parser.parse_args()
    prompts = make_prompts(arguments.tokenizer, 1000, 16, seed=0)
    situations = [
        Situation("alone", None),
        Situation("grammars", itertools.cycle(map(with_grammar, grammars()))),
        Situation("prompts", itertools.cycle(map(with_prompt, prompts))),
    ]
    asyncio.run(measure(arguments.url, situations, arguments.rounds, arguments.seconds))
    print(describe(situations))


def grammars() -> list[dict[str, Any]]:
    """All are refused: some at once, some because they do not compile in time."""
    alike = [{"type": "string", "pattern": f".*[a-m]{{{size}}}.*x"} for size in range(1, 30)]
    nested: dict[str, Any] = {"type": "string"}
    for _ in range(60):
        nested = {"properties": {"a": nested}}
    doubling = {
        f"d{i}": {"properties": {name: {"$ref": f"#/$defs/d{i + 1}"} for name in "ab"}} for i in range(40)
    }
    numbers = [f"{number:07d}" for number in range(8000)]
    return [
        schema({"allOf": alike}),
        {"type": "regex", "value": "("},
        schema({"$ref": "#/$defs/d0"}, **{"$defs": doubling}),
        {"type": "regex", "value": "((a{1,999}){1,999}b){1,999}"},
        schema(nested),
        schema({"type": "number and a half"}),
        schema({"allOf": [*alike, {"minLength": 3}]}),
        {"type": "regex", "value": "(" * 3000 + "a" + ")" * 3000},
        schema({"enum": numbers, "pattern": "("}),
        {"type": "json", "value": '{"properties":' * 20000},
        {"type": "lark", "value": "start: nowhere"},
    ]


def schema(a: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "json", "value": {"type": "object", "properties": {"a": a}, "required": ["a"]} | more}


def with_grammar(grammar: dict[str, Any]) -> dict[str, Any]:
    return {"inputs": "a", "parameters": {"max_new_tokens": 2, "grammar": grammar}}


def with_prompt(prompt: str) -> dict[str, Any]:
    return {"inputs": prompt, "parameters": {"max_new_tokens": MAX_NEW_TOKENS}}


async def measure(url: str, situations: list[Situation], rounds: int, seconds: float) -> None:
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(url, timeout=timeout) as session:
        await stream(session, [], time.perf_counter() + 2)  # what the first request costs is nobody's gap
        for _ in range(rounds):
            for situation in situations:
                until = time.perf_counter() + seconds
                neighbour = asyncio.create_task(stream(session, situation.gaps_ms, until))
                await asyncio.gather(neighbour, ask(session, situation, until))


async def stream(session: aiohttp.ClientSession, gaps_ms: list[float], until: float) -> None:
    """Streams behind one another."""
    body = {
        "prompt": "Count.",
        "max_tokens": STREAM_TOKENS,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }
    while time.perf_counter() < until:
        async with session.post("/v1/completions", json=body) as response:
            response.raise_for_status()
            last_at = None
            async for _ in response.content.iter_any():
                now = time.perf_counter()
                if last_at is not None:
                    gaps_ms.append((now - last_at) * 1000)
                last_at = now
                if now > until:
                    return


async def ask(session: aiohttp.ClientSession, situation: Situation, until: float) -> None:
    while situation.bodies is not None and time.perf_counter() < until:
        data = json.dumps(next(situation.bodies)).encode()
        began_at = time.perf_counter()
        async with session.post(
            "/generate", data=data, headers={"Content-Type": "application/json"}
        ) as response:
            text = await response.text()
        situation.answers_ms.append((time.perf_counter() - began_at) * 1000)
        if response.status != 422:
            sys.exit(f"{situation.name}: expected a refusal (422), got {response.status}: {text[:200]}")


def describe(situations: list[Situation]) -> str:
    alone = percentiles(situations[0].gaps_ms)
    lines = [
        "situation   gaps     p50 ms    p99 ms   max ms   p50 ratio  p99 ratio  answers  slowest answer ms"
    ]
    for situation in situations:
        p50, p99 = percentiles(situation.gaps_ms)
        slowest = f"{max(situation.answers_ms):.0f}" if situation.answers_ms else "-"
        lines.append(
            f"{situation.name:<10}{len(situation.gaps_ms):6}{p50:11.2f}{p99:10.2f}{max(situation.gaps_ms):9.1f}"
            f"{p50 / alone[0]:12.2f}{p99 / alone[1]:11.2f}{len(situation.answers_ms):9}{slowest:>19}"
        )
    return "\n".join(lines)


def percentiles(values: list[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(values, n=100)
    return statistics.median(values), cuts[98]


if __name__ == "__main__":
    main()
