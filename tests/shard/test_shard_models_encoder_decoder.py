"""Encoder-decoder models compute what transformers computes, however a step batches, resumes, pages them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny_models
from engine_driver import Driver, Stream, generate, load_engine
from model_steps import Row, Stepper
from tgi_shard.distributed import SINGLE
from tgi_shard.models.registry import LoadedModel, UnsupportedModel, load_model
from tgi_shard.plan import AddSequence
from tgi_shard.sampling.parameters import SamplingParameters

CPU = torch.device("cpu")
LENGTHS = (1, 7, 33, 70)  # beyond the last bucket of the relative positions, and several blocks
START = [tiny_models.PAD_ID]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    model_type: (model_type, {}) for model_type in tiny_models.ENCODER_DECODERS
} | tiny_models.ENCODER_DECODER_VARIANTS


@dataclass(frozen=True)
class Pair:
    """A checkpoint in our hands and in transformers'."""

    checkpoint: Path
    loaded: LoadedModel
    oracle: torch.nn.Module

    @torch.inference_mode()
    def expected(self, prompt: Sequence[int], target: Sequence[int]) -> Tensor:
        """transformers' logits behind each of the decoder's tokens: [tokens, vocab_size]."""
        logits: Tensor = self.oracle(
            input_ids=torch.tensor([list(prompt)]), decoder_input_ids=torch.tensor([list(target)])
        ).logits[0]
        return logits


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    model_type, overrides = CASES[request.param]
    checkpoint = tiny_models.save(model_type, tmp_path_factory.mktemp(request.param), **overrides)
    loaded = load_model(checkpoint, dtype=torch.float32, device=CPU, group=SINGLE)
    return Pair(checkpoint, loaded, tiny_models.oracle(checkpoint))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def begin(stepper: Stepper, prompts: list[list[int]]) -> tuple[list[Row], Tensor]:
    rows = [Row([*prompt, *START]) for prompt in prompts]
    return rows, stepper.step([(row, len(row.token_ids)) for row in rows])


def feed(stepper: Stepper, rows: list[Row], token_ids: Sequence[int]) -> Tensor:
    for row, token_id in zip(rows, token_ids, strict=True):
        row.token_ids.append(token_id)
    return stepper.step([(row, 1) for row in rows])


def test_logits_in_a_ragged_batch(pair: Pair) -> None:
    prompts, num_steps = tiny_models.prompts(LENGTHS), 50
    answers = tiny_models.prompts([num_steps] * len(prompts), seed=1)
    stepper = Stepper(pair.loaded)
    rows, logits = begin(stepper, prompts)
    ours = [logits, *(feed(stepper, rows, token_ids) for token_ids in zip(*answers, strict=True))]
    favourites = set()
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        expected = pair.expected(prompt, START + answer)
        of_row = torch.stack([step[index] for step in ours])
        assert_close(of_row, expected)
        assert torch.equal(of_row.argmax(-1), expected.argmax(-1))
        favourites |= set(expected.argmax(-1).tolist())
    assert len(favourites) > num_steps // 3, "a model that repeats itself proves nothing"


@pytest.mark.parametrize("num_first", [38, 42, 60], ids=["start token", "some", "whole"])
def test_resumed_from_prompt_and_answer(pair: Pair, num_first: int) -> None:
    """The encoder over the prompt and the decoder over what it has said, beside rows that decode."""
    prompt, other = tiny_models.prompts((37, 20))
    answer, of_other = tiny_models.prompts((22, 2), seed=1)
    stepper = Stepper(pair.loaded)
    (neighbour,), _ = begin(stepper, [other])
    feed(stepper, [neighbour], of_other[:1])
    row = Row([*prompt, *START, *answer], prompt_len=38)
    neighbour.token_ids.append(of_other[1])
    first, of_neighbour = stepper.step([(row, num_first), (neighbour, 1)])
    expected = pair.expected(prompt, START + answer)
    assert_close(first, expected[num_first - 38])
    assert_close(of_neighbour, pair.expected(other, START + of_other)[-1])
    if num_first < 60:  # what is left of the answer may come in chunks
        assert_close(stepper.step([(row, 60 - num_first)], all_logits=True), expected[num_first - 37 :])
    assert_close(feed(stepper, [row], [5])[0], pair.expected(prompt, [*START, *answer, 5])[-1])


def test_a_row_does_not_depend_on_its_neighbours(pair: Pair) -> None:
    prompts = tiny_models.prompts((40, 3, 90, 17, 64))
    alone_stepper, crowd_stepper = Stepper(pair.loaded), Stepper(pair.loaded)
    (alone,), logits = begin(alone_stepper, prompts[:1])
    crowd, crowd_logits = begin(crowd_stepper, prompts)
    torch.testing.assert_close(crowd_logits[:1], logits, rtol=1e-5, atol=1e-5)
    after_alone = feed(alone_stepper, [alone], [7])
    after_crowd = feed(crowd_stepper, crowd, [7, 8, 9, 10, 11])
    torch.testing.assert_close(after_crowd[:1], after_alone, rtol=1e-5, atol=1e-5)


def test_a_slot_that_held_infinities_harms_nobody(pair: Pair) -> None:
    """What a broken sequence left behind is cleared by the next owner of its block."""
    (prompt,) = tiny_models.prompts((21,))
    stepper = Stepper(pair.loaded)
    for store in stepper.kv_cache.stores:
        store.fill_(float("nan"))
    _, logits = begin(stepper, [prompt])
    assert_close(logits, pair.expected(prompt, START))


def sampling(index: int) -> SamplingParameters:
    """Greedy, drawn, and penalised in turn."""
    return (
        SamplingParameters(repetition_penalty=1.3),
        SamplingParameters(do_sample=True, temperature=1.5, seed=index),
        SamplingParameters(frequency_penalty=0.7, output_presence_penalty=1.0),
    )[index % 3]


def streams() -> list[Stream]:
    prompts = tiny_models.prompts((5, 31, 1, 18, 44, 9), seed=2)
    return [Stream([*prompt, *START], sampling(index)) for index, prompt in enumerate(prompts)]


def test_alone_as_among_others(pair: Pair) -> None:
    engine = load_engine(pair.checkpoint)
    together = [stream.output for stream in generate(engine, streams(), 20, depth=2)]
    alone = [generate(engine, [stream], 20)[0].output for stream in streams()]
    assert together == alone


def test_preempted_and_resumed(pair: Pair) -> None:
    engine = load_engine(pair.checkpoint)
    undisturbed = [stream.output for stream in generate(engine, streams(), 20)]
    engine.forget()
    driver = Driver(engine)
    for index, stream in enumerate(streams()):
        driver.add(index, stream)
    for step in range(20):
        driver.step()
        if step % 3 == 2:
            victim = step % 6
            driver.add(victim, driver.drop(victim))
    driver.run(20)
    assert [stream.output[:20] for _, stream in sorted(driver.streams.items())] == undisturbed


@torch.inference_mode()
def test_greedy_tokens_with_a_penalty_are_those_of_generate(pair: Pair) -> None:
    """The penalty is over what the decoder has said, its start token included; not over the prompt."""
    prompts = tiny_models.prompts((30, 11), seed=4)
    ours = generate(
        load_engine(pair.checkpoint),
        [Stream([*prompt, *START], SamplingParameters(repetition_penalty=3.0)) for prompt in prompts],
        24,
    )
    for prompt, stream in zip(prompts, ours, strict=True):
        theirs = pair.oracle.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=24,
            do_sample=False,
            repetition_penalty=3.0,
            eos_token_id=None,
            use_cache=False,  # its cache counts the encoder's layers for the decoder
        )
        assert stream.output == theirs[0, 1:].tolist()
        assert len(set(stream.output)) > 8


def test_what_an_encoder_cannot_do_fails_the_sequence(pair: Pair) -> None:
    prompt, none = np.array([1, 2, 3, *START]), np.array([], np.int64)
    engine = load_engine(pair.checkpoint)
    driver = Driver(engine, chunk=3)
    driver.add(1, Stream(prompt.tolist()))
    stream = driver.streams[1]
    driver.step()
    assert stream.error == "the plan runs 3 tokens of a prompt of 4: it needs all"
    for sequence in (
        AddSequence(2, prompt, none, prompt_logprobs=True),
        AddSequence(2, prompt, none, num_cached_tokens=2),
    ):
        assert "an encoder reads the prompt" in str(engine.slots._problem(sequence, prompt))
    assert engine.slots._problem(AddSequence(2, np.array(START), none), prompt) == "the prompt has no token"


def test_float16_is_refused_where_it_overflows(tmp_path: Path) -> None:
    checkpoint = tiny_models.save("t5", tmp_path)
    with pytest.raises(UnsupportedModel, match="leave the range of float16; use bfloat16 or float32"):
        load_model(checkpoint, dtype=torch.float16, device=CPU, group=SINGLE)


def test_bfloat16_stays_near(pair: Pair, tmp_path: Path) -> None:
    """Against float32 on the same weights: no further off than 1.5 times what transformers is."""
    loaded = load_model(pair.checkpoint, dtype=torch.bfloat16, device=CPU, group=SINGLE)
    prompts = tiny_models.prompts((7, 33, 50, 21))
    _, ours = begin(Stepper(loaded), prompts)
    rounded = Pair(pair.checkpoint, loaded, tiny_models.oracle(pair.checkpoint, torch.bfloat16))
    exact = torch.stack([pair.expected(prompt, START)[0] for prompt in prompts])
    theirs = torch.stack([rounded.expected(prompt, START)[0].float() for prompt in prompts])
    assert error(ours, exact) < 1.5 * error(theirs, exact)


def error(logits: Tensor, reference: Tensor) -> float:
    return float((logits - reference).square().mean(-1).sqrt().median())
