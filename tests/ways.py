"""The ways in which an answer comes about on paged blocks. All must give the same numbers."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

import tiny_models
from model_steps import Row, Stepper

NUM_GENERATED = 12


@dataclass
class Answer:
    """One sequence as it is written, each token the likeliest."""

    row: Row
    num_prompt: int
    chosen_from: list[Tensor] = field(default_factory=list)  # [vocab_size] for each token of the answer

    @property
    def scores(self) -> Tensor:
        return torch.stack(self.chosen_from)

    @property
    def said(self) -> list[int]:
        return self.row.token_ids[self.num_prompt :]

    @property
    def is_done(self) -> bool:
        return len(self.said) == NUM_GENERATED

    @property
    def num_waiting(self) -> int:
        """Tokens that are known and not computed."""
        return len(self.row.token_ids) - self.row.num_computed

    def taken_up_again(self) -> "Answer":
        """As after a preemption: all its tokens, and nothing computed."""
        return Answer(
            Row(list(self.row.token_ids), prompt_len=self.num_prompt), self.num_prompt, self.chosen_from
        )


class Writer:
    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper
        self.start = list(stepper.loaded.decoder_start_token_ids)

    def begin(self, prompt: list[int]) -> Answer:
        token_ids = prompt + self.start
        return Answer(Row(token_ids), len(token_ids))

    def step(self, *scheduled: tuple[Answer, int]) -> None:
        """Process so many tokens of each; who has none left to process then gets one more."""
        logits = self.stepper.step([(answer.row, num_tokens) for answer, num_tokens in scheduled])
        for (answer, _), scores in zip(scheduled, logits, strict=True):
            if not answer.num_waiting:
                answer.chosen_from.append(scores)
                answer.row.token_ids.append(int(scores.argmax()))

    def finish(self, *answers: Answer) -> list[Answer]:
        while unfinished := [answer for answer in answers if not answer.is_done]:
            self.step(*((answer, answer.num_waiting) for answer in unfinished))
        return list(answers)

    def release(self, answer: Answer) -> None:
        """Its blocks are the next that are granted."""
        self.stepper.free += answer.row.block_ids


def whole(writer: Writer) -> list[Answer]:
    (prompt,) = tiny_models.prompts((70,))
    return writer.finish(writer.begin(prompt))


def batched(writer: Writer) -> list[Answer]:
    """Ragged: less than a block, one and a bit, several."""
    return writer.finish(*map(writer.begin, tiny_models.prompts((1, 7, 33, 70))))


def chunked(writer: Writer) -> list[Answer]:
    """In pieces that end within blocks, beside one that is being answered."""
    long, short = map(writer.begin, tiny_models.prompts((50, 7)))
    writer.step((long, 20), (short, 7))
    writer.step((short, 1), (long, 13))
    writer.step((short, 1), (long, 1))
    writer.step((long, 16), (short, 1))
    return writer.finish(long, short)


def preempted(writer: Writer) -> list[Answer]:
    """Another one takes its blocks; then it is computed anew, beside two that go on."""
    first, second, other = map(writer.begin, tiny_models.prompts((39, 21, 40)))
    for _ in range(4):
        writer.step((first, first.num_waiting), (second, second.num_waiting))
    writer.release(first)
    for _ in range(2):
        writer.step((other, other.num_waiting), (second, second.num_waiting))
    return writer.finish(first.taken_up_again(), second, other)


def prefix_cached(writer: Writer) -> list[Answer]:
    """Prompts that begin alike: the second finds two blocks of the first, while that is being answered."""
    head, tail = tiny_models.prompts((40, 9))
    first, second = writer.begin(head), writer.begin(head[:32] + tail)
    for _ in range(2):
        writer.step((first, first.num_waiting))
    size = writer.stepper.kv_cache.block_size
    second.row.block_ids = first.row.block_ids[: 32 // size]
    second.row.num_computed = 32
    return writer.finish(first, second)


WAYS: dict[str, Callable[[Writer], list[Answer]]] = {
    function.__name__: function for function in (whole, chunked, batched, preempted, prefix_cached)
}


def possible(model_type: str) -> list[str]:
    """A recurrent model leaves no prefix behind; an encoder reads a prompt at once."""
    has_prefixes = model_type not in (*tiny_models.RECURRENT, *tiny_models.ENCODER_DECODERS)
    has_chunks = model_type not in tiny_models.ENCODER_DECODERS
    is_possible = {"prefix_cached": has_prefixes, "chunked": has_chunks}
    return [way for way in WAYS if is_possible.get(way, True)]


@torch.inference_mode()
def expected(oracle: PreTrainedModel, answer: Answer) -> Tensor:
    """transformers' scores for each token of the answer: [tokens, vocab_size]."""
    logits: Tensor
    *token_ids, _ = answer.row.token_ids  # the last one was chosen and not read
    last = answer.num_prompt - 1  # of the prompt; of an encoder-decoder's, the start token
    if oracle.config.is_encoder_decoder:
        prompt, target = torch.tensor([token_ids[:last]]), torch.tensor([token_ids[last:]])
        logits = oracle(input_ids=prompt, decoder_input_ids=target).logits[0]
        return logits
    logits = oracle(torch.tensor([token_ids])).logits[0, last:]
    return logits
