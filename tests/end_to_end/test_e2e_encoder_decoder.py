"""A T5 behind the real launcher, router and shards: what transformers says, whoever else is served."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import tiny_models
from server import Server

PROMPTS = [f"translate English to German: the house number {i} {'is wonderful ' * i}" for i in range(8)]
NUM_TOKENS = 100


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It never ends by itself. As many layers on both sides: transformers' cache counts one alone."""
    path = tiny_models.save("t5", tmp_path_factory.mktemp("tiny-t5"), num_decoder_layers=2)
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(fields | {"eos_token_id": None}))
    return path


@pytest.fixture(scope="module")
def expected(tiny_t5: Path) -> list[list[int]]:
    tokenizer, model = Tokenizer.from_file(str(tiny_t5 / "tokenizer.json")), tiny_models.oracle(tiny_t5)
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        answer = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            repetition_penalty=3.0,
            eos_token_id=None,
        )
        answers.append(answer[0, 1:].tolist())
    assert len({token_id for answer in answers for token_id in answer}) > NUM_TOKENS
    return answers


def ask(server: Server, prompt: str) -> list[int]:
    answer = server.generate(prompt, max_new_tokens=NUM_TOKENS, repetition_penalty=3.0)
    return [token["id"] for token in answer["details"]["tokens"]]


@pytest.mark.parametrize("num_shard", [1, 2])
def test_answers_are_those_of_transformers(
    num_shard: int, tiny_t5: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    """One after the other, all at once in a KV cache too small for all, and across the death of a shard."""
    args = ("--num-shard", str(num_shard), "--max-batch-total-tokens", "512", "--max-total-tokens", "256")
    with Server(str(tiny_t5), tmp_path, *args, "--enable-prefill-logprobs") as server:
        assert [ask(server, prompt) for prompt in PROMPTS[:2]] == expected[:2]
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            together = [pool.submit(ask, server, prompt) for prompt in PROMPTS]
            assert [answer.result() for answer in together] == expected
        assert server.metric("tgi_preemptions") > 0
        assert server.metric("tgi_prefix_cache_hit_tokens") == 0
        if num_shard == 1:
            stream = server.stream(PROMPTS[3], max_new_tokens=NUM_TOKENS, repetition_penalty=3.0)
            received = [next(stream)["token"]["id"] for _ in range(3)]
            os.kill(server.shard_pids[0], signal.SIGKILL)
            assert received + [event["token"]["id"] for event in stream] == expected[3]
            return
        details = server.generate(PROMPTS[0], max_new_tokens=3)["details"]
        assert len(details["tokens"]) == details["generated_tokens"] == 3
        usage = server.client.post("/v1/completions", json={"prompt": PROMPTS[0], "max_tokens": 3}).json()[
            "usage"
        ]
        num_prompt_tokens = len(Tokenizer.from_file(str(tiny_t5 / "tokenizer.json")).encode(PROMPTS[0]).ids)
        assert usage["prompt_tokens"] == num_prompt_tokens, "the start token is not the client's"
        body = {"inputs": "x", "parameters": {"decoder_input_details": True}}
        refused = server.client.post("/generate", json=body)
        assert refused.status_code == 422
        assert "with an encoder, which gives it none" in refused.json()["error"]


def test_a_prompt_must_fit_into_one_step(tiny_t5: Path, tmp_path: Path) -> None:
    args = ("--max-batch-prefill-tokens", "68", "--max-concurrent-requests", "4")
    with Server(str(tiny_t5), tmp_path, *args) as server:
        assert server.client.get("/info").json()["max_input_tokens"] == 63
        longest = server.client.post(
            "/generate", json={"inputs": "é" * 31, "parameters": {"max_new_tokens": 2}}
        )
        assert longest.status_code == 200, longest.text
        refused = server.client.post("/generate", json={"inputs": "é" * 32})
        assert refused.status_code == 422
        assert refused.json()["error"].endswith("`inputs` must have less than 63 tokens. Given: 64")
