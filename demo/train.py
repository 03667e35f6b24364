"""Makes the demo model from nothing: text, tokenizer, training, and the folder that `--model-id demo` serves.

Run: `python demo/train.py` (under an hour on two cores), then `python demo/evaluate.py`.
"""

import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from chat import CHAT_TEMPLATE, END, PAD, SPECIAL_TOKENS, VOCAB_SIZE, TrainingText, Writer, train_tokenizer
from skills import SKILLS, Draw, Example

MODEL_PATH = Path(__file__).parent / "tgi_demo" / "model"

WEIGHTS = {
    "arithmetic": 4.0,
    "counting": 3.0,
    "spelling": 2.5,
    "reversing": 3.0,
    "capitals": 0.8,
    "dates": 1.8,
    "JSON extraction": 1.6,
    "this server": 0.8,
    "small talk": 0.6,
    "story": 0.15,
}
"""How often training draws each skill, by how hard it is."""


def roughen(prompt: str, rng: random.Random) -> str:
    """Now and then the prompt as a hurried person types it: a small first letter, no full stop."""
    if rng.random() < 0.1:
        prompt = prompt[0].lower() + prompt[1:]
    if rng.random() < 0.1 and prompt[-1] in ".?!":
        prompt = prompt[:-1]
    return prompt


def training_texts(writer: Writer, rng: random.Random) -> Iterator[TrainingText]:
    """Without end: chats of one to four turns, with or without a system prompt, and plain questions."""
    draw = Draw(rng, held_out=False)
    names, weights = list(WEIGHTS), list(WEIGHTS.values())

    def example() -> Example:
        drawn = SKILLS[rng.choices(names, weights)[0]](draw)
        return Example(roughen(drawn.prompt, rng), drawn.answer, drawn.letter_by_letter)

    while True:
        if rng.random() < 0.45:
            yield writer.plain(example(), rng)
        else:
            num_turns = rng.choices((1, 2, 3, 4), (5, 2, 1, 1))[0]
            yield writer.chat([example() for _ in range(num_turns)], rng)


def batches(writer: Writer, rng: random.Random, num_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end: ids [rows, longest] padded on the right, and the weight of each token's loss.

    rows x longest <= num_tokens. Texts of like length share a batch, so little of it is padding.
    """
    texts = training_texts(writer, rng)
    while True:
        pool = sorted((next(texts) for _ in range(8192)), key=lambda text: len(text.token_ids))
        groups: list[list[TrainingText]] = [[]]
        for text in pool:
            if (len(groups[-1]) + 1) * len(text.token_ids) > num_tokens:
                groups.append([])
            groups[-1].append(text)
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(text.token_ids) for text in group)
            ids = torch.zeros(len(group), longest, dtype=torch.long)
            weights = torch.zeros(len(group), longest)
            for row, text in enumerate(group):
                ids[row, : len(text.token_ids)] = torch.tensor(text.token_ids)
                weights[row, : len(text.weights)] = torch.tensor(text.weights)
            yield ids, weights


def make_tokenizer(seed: int) -> Tokenizer:
    """Trained on every skill but spelling and reversing: so a word to spell stays in a few short pieces."""
    draw = Draw(random.Random(f"tokenizer {seed}"), held_out=False)
    skills = [skill for name, skill in SKILLS.items() if name not in ("spelling", "reversing")]
    examples = [skill(draw) for skill in skills for _ in range(2000)]
    return train_tokenizer(
        text for example in examples for text in (example.prompt, example.answer, " " + example.answer)
    )


def make_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """3.2M parameters. Heads, key-value heads, widths and vocabulary divide by 4: up to four shards."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.token_to_id(END),
            pad_token_id=tokenizer.token_to_id(PAD),
        )
    )


def answer_loss(
    model: LlamaForCausalLM, body: Callable[[Tensor], Tensor], ids: Tensor, weights: Tensor
) -> Tensor:
    """Weighted mean cross entropy over the answers' tokens. Padding comes last: no token looks at it.

    body: ids [rows, length] -> hidden [rows, length, hidden_size]: the model without its head.
    """
    wanted = weights[:, 1:] > 0
    logits = model.lm_head(body(ids[:, :-1])[wanted])
    losses = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][wanted], reduction="none")
    return (losses * weights[:, 1:][wanted]).sum() / weights[:, 1:].sum()


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, path: Path) -> None:
    """Replaces the folder at once, so that whoever reads it finds either the old model or the new one."""
    fresh, stale = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    half = LlamaForCausalLM(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    half.config.dtype = torch.bfloat16
    half.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id
    )
    half.save_pretrained(fresh)
    tokenizer.save(str(fresh / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.max_position_embeddings,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [token for token in SPECIAL_TOKENS if token not in (END, PAD)],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (fresh / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    if path.exists():
        path.rename(stale)
    fresh.rename(path)
    shutil.rmtree(stale, ignore_errors=True)


def make_optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, which learn in fewer steps than with AdamW; AdamW for the rest."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [model.model.embed_tokens.weight, *(p for p in model.parameters() if p.ndim < 2)]
    return [
        torch.optim.Muon(matrices, lr=2 * learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def learning_rate_factor(step: int, num_steps: int) -> float:
    """A short linear warm-up, then half a cosine down to almost nothing."""
    num_warmup = min(200, num_steps // 10)
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / (num_steps - num_warmup)))


def train(
    model: LlamaForCausalLM,
    source: Iterator[tuple[Tensor, Tensor]],
    num_steps: int,
    learning_rate: float,
    is_compiled: bool,
) -> Iterator[int]:
    """Trains in place, tells its progress, and yields the number of each step once taken."""

    def body(ids: Tensor) -> Tensor:
        hidden: Tensor = model.model(ids, use_cache=False).last_hidden_state
        return hidden

    run_body = torch.compile(body, dynamic=True) if is_compiled else body
    optimizers = make_optimizers(model, learning_rate)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate_factor, num_steps=num_steps))
        for optimizer in optimizers
    ]
    started, num_tokens, losses = time.monotonic(), 0, []
    for step in range(1, num_steps + 1):
        ids, weights = next(source)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = answer_loss(model, run_body, ids, weights)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        num_tokens += ids.numel()
        losses.append(loss.item())
        if step % 50 == 0 or step == num_steps:
            elapsed = time.monotonic() - started
            print(
                f"step {step}/{num_steps}  loss {sum(losses) / len(losses):.4f}  "
                f"{num_tokens / elapsed:,.0f} tokens/s  "
                f"{elapsed:.0f} s passed, {elapsed / step * (num_steps - step):.0f} s left",
                flush=True,
            )
            losses.clear()
        yield step


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=MODEL_PATH, help="Folder to write.")
@click.option("--steps", default=3600, help="Optimizer steps.", show_default=True)
@click.option("--batch-tokens", default=4096, help="Tokens of a batch, with padding.", show_default=True)
@click.option("--learning-rate", default=2e-3, help="AdamW's; Muon's is twice that.", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=2, help="CPU threads.", show_default=True)
@click.option("--compiled/--eager", default=True, help="Compiled is twice as fast; it needs a C++ compiler.")
@click.option("--save-every", default=500, help="Write the folder every so many steps.", show_default=True)
def main(
    out: Path,
    steps: int,
    batch_tokens: int,
    learning_rate: float,
    seed: int,
    threads: int,
    compiled: bool,
    save_every: int,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(seed)
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, vocabulary {tokenizer.get_vocab_size()}", flush=True)
    source = batches(Writer(tokenizer), random.Random(f"train {seed}"), batch_tokens)
    for step in train(model, source, steps, learning_rate, compiled):
        if step % save_every == 0 or step == steps:
            save(model, tokenizer, out)
    print(f"saved {out}")


if __name__ == "__main__":
    main()
