"""Prints how often the demo model's greedy answers are right on prompts that training never showed.

An answer is right if it equals the expected text to the letter and the model ends it by itself.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from chat import PLAIN_FORMS
from skills import SKILLS, Example, held_out

MODEL_PATH = Path(__file__).parent / "tgi_demo" / "model"


def load(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(path)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(rendered, str)
    return rendered


def chat_prompts(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[str]:
    return [chat_prompt(tokenizer, [{"role": "user", "content": example.prompt}]) for example in examples]


def plain_prompts(examples: Sequence[Example], seed: int = 0) -> list[str]:
    """The same questions in the forms that completion clients send."""
    rng = random.Random(f"forms {seed}")
    return [rng.choice(PLAIN_FORMS)[0].format(example.prompt) for example in examples]


@torch.inference_mode()
def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch: int = 64,
) -> list[str | None]:
    """What the model answers, in the order of the prompts; None where it does not come to an end.

    Prompts of the same length run together, so that no padding is needed.
    """
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    answers: list[str | None] = [None] * len(prompts)
    while order:
        length = len(encoded[order[0]])
        rows = [i for i in order[:batch] if len(encoded[i]) == length]
        order = order[len(rows) :]
        ids = torch.tensor([encoded[i] for i in rows])
        output: Tensor = model.generate(  # type: ignore[operator]  # transformers types it as a tensor
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens
        )
        for i, tokens in zip(rows, output[:, length:].tolist(), strict=True):
            if model.config.eos_token_id in tokens:
                end = tokens.index(model.config.eos_token_id)
                answers[i] = str(tokenizer.decode(tokens[:end])).strip()
    return answers


def accuracy(answers: Sequence[str | None], examples: Sequence[Example]) -> float:
    return sum(answer == example.answer for answer, example in zip(answers, examples, strict=True)) / len(
        examples
    )


def max_answer_tokens(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> int:
    """Room for the longest expected answer, however it is cut into tokens, and its end."""
    return (
        max(
            len(example.answer) if example.letter_by_letter else len(tokenizer(example.answer)["input_ids"])
            for example in examples
        )
        + 4
    )


@click.command()
@click.option("--model", "path", type=click.Path(path_type=Path), default=MODEL_PATH, show_default=True)
@click.option("--num-prompts", default=200, help="Held-out prompts of each skill.", show_default=True)
@click.option("--dtype", "dtypes", multiple=True, default=("float32", "bfloat16"), show_default=True)
@click.option("--skill", "skills", multiple=True, default=tuple(SKILLS), help="Only these skills.")
@click.option("--show", default=0, help="Print so many wrong answers of each skill.")
@click.option("--threads", default=1, show_default=True)
def main(
    path: Path, num_prompts: int, dtypes: Sequence[str], skills: Sequence[str], show: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    columns = [f"{form}, {dtype}" for dtype in dtypes for form in ("chat", "plain")]
    loaded = [load(path, getattr(torch, dtype)) for dtype in dtypes]
    print("| skill | prompts | " + " | ".join(columns) + " |")
    print("|---|---:|" + "---:|" * len(columns))
    for skill in skills:
        examples = held_out(skill, num_prompts)
        cells = []
        for model, tokenizer in loaded:
            for prompts in (chat_prompts(tokenizer, examples), plain_prompts(examples)):
                answers = greedy_answers(model, tokenizer, prompts, max_answer_tokens(tokenizer, examples))
                cells.append(f"{accuracy(answers, examples):.1%}")
                wrong = [
                    (p, a, e.answer)
                    for p, a, e in zip(prompts, answers, examples, strict=True)
                    if a != e.answer
                ]
                for prompt, answer, expected in wrong[:show]:
                    click.echo(f"    {prompt!r}: {answer!r}, not {expected!r}", err=True)
        print(f"| {skill} | {len(examples)} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
