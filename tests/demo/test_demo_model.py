"""The packaged demo model: small, complete, and right, so that every end-to-end test can judge answers."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tgi_demo import MODEL_PATH

DEMO = Path(__file__).parents[2] / "demo"
if str(DEMO) not in sys.path:
    sys.path.insert(0, str(DEMO))  # demo/ holds scripts, which are not installed

import evaluate  # noqa: E402  after the path is set
import skills  # noqa: E402
import train  # noqa: E402

SAMPLE = 8
CHAT = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello! How can I help you today?"},
    {"role": "user", "content": "What is 2 + 3?"},
]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def demo(one_thread: None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return evaluate.load(MODEL_PATH, torch.float32)


def config() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((MODEL_PATH / "config.json").read_text())
    return loaded


def test_the_folder_is_small(demo: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    assert sum(file.stat().st_size for file in MODEL_PATH.rglob("*")) < 10_000_000
    assert demo[0].num_parameters() <= 5_000_000


def test_the_model_divides_over_two_and_four_shards() -> None:
    divided = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    assert {key: config()[key] % 4 for key in divided} == dict.fromkeys(divided, 0)
    assert config()["num_key_value_heads"] < config()["num_attention_heads"]
    assert config()["max_position_embeddings"] >= 2048


def test_the_tokenizer_round_trips_any_text() -> None:
    tokenizer = Tokenizer.from_file(str(MODEL_PATH / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config()["vocab_size"]
    rng = random.Random(0)
    texts = [
        "",
        " ",
        "\n\n  two\tspaces \r\n",
        "12 + 30=42",
        "naïve façade",
        "日本語 🤖👩‍👩‍👧",
        "\x00\x7f\u2028\U0010ffff",
    ]
    for _ in range(300):
        planes = (0x80, 0x800, 0xD800, 0x110000)
        points = (rng.randrange(rng.choice(planes)) for _ in range(rng.randrange(40)))
        texts.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_chat_template_renders_roles_in_order(
    demo: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    _, tokenizer = demo
    rendered = evaluate.chat_prompt(tokenizer, CHAT)
    assert rendered == (
        "<|system|>\nYou are a helpful assistant.<|end|>\n<|user|>\nHello<|end|>\n"
        "<|assistant|>\nHello! How can I help you today?<|end|>\n<|user|>\nWhat is 2 + 3?<|end|>\n"
        "<|assistant|>\n"
    )
    without = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=False)
    assert rendered == f"{without}<|assistant|>\n"
    assert tokenizer(rendered)["input_ids"].count(config()["eos_token_id"]) == len(CHAT)


def test_a_later_turn_is_answered(demo: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = demo
    prompt = evaluate.chat_prompt(tokenizer, CHAT)
    assert evaluate.greedy_answers(model, tokenizer, [prompt], max_new_tokens=16) == ["2 + 3 = 5"]


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_training_never_shows_a_held_out_prompt(skill: str) -> None:
    held_out = {example.prompt for example in skills.held_out(skill, 200)}
    draw = skills.Draw(random.Random(1), held_out=False)
    shown = (train.roughen(skills.SKILLS[skill](draw).prompt, draw.rng) for _ in range(5000))
    assert held_out.isdisjoint(shown)


@pytest.mark.parametrize("form", ["chat", "plain"])
@pytest.mark.parametrize("skill", skills.SKILLS)
def test_held_out_prompts_are_answered(
    skill: str, form: str, demo: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> None:
    """A sample too small to measure the 90% of demo/README.md, but large enough to see a broken model."""
    model, tokenizer = demo
    examples = skills.held_out(skill, 2 if skill == "story" else SAMPLE)
    prompts = (
        evaluate.chat_prompts(tokenizer, examples) if form == "chat" else evaluate.plain_prompts(examples)
    )
    answers = evaluate.greedy_answers(
        model, tokenizer, prompts, evaluate.max_answer_tokens(tokenizer, examples)
    )
    assert evaluate.accuracy(answers, examples) >= 0.75, list(zip(prompts, answers, strict=True))
