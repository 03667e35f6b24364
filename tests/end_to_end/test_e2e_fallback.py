"""A family without a page of ours, served through transformers' code by real processes."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

import tiny_models
from conftest import Launch
from server import Server

PROMPT = "This prompt is longer than a block of the cache, and the answer goes on from its last letters."


def answer(server: Server) -> list[int]:
    details = server.generate(PROMPT, max_new_tokens=24)["details"]
    return [token["id"] for token in details["tokens"]]


def test_the_tokens_are_those_of_transformers(launch: Launch, tmp_path: Path) -> None:
    model = tiny_models.save("helium", tmp_path / "model", seed=5)
    tiny_models.never_ends(model)
    with launch(model=str(model)) as server:
        on_one = answer(server)
    with launch("--num-shard", "2", model=str(model)) as server:
        on_two = answer(server)
    prompt_ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(PROMPT).ids
    with torch.inference_mode():
        logits = tiny_models.oracle(model)(torch.tensor([prompt_ids + on_one])).logits[0]
    expected = logits[len(prompt_ids) - 1 : -1].argmax(-1).tolist()
    assert len(expected) == 24
    assert on_one == expected
    assert on_two == expected
