"""The engine on tiny models: what it generates is what transformers generates, however the steps are cut."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny_models
from engine_driver import BLOCK_SIZE, Driver, Stream, generate, load_engine, make_plan, prompts
from tgi_shard.engine import MAX_PROMPT_LOGITS, Engine
from tgi_shard.plan import AddSequence
from tgi_shard.sampling.parameters import SamplingParameters

NUM_OUTPUT = 12
LENGTHS = (1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE + 3, 40)


EMBEDDINGS = {
    "llama": "model.embed_tokens.weight",
    "mamba": "backbone.embeddings.weight",
    "mamba2": "backbone.embeddings.weight",
}
KINDS = pytest.mark.parametrize("checkpoint", EMBEDDINGS, indirect=True)  # without it: llama


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_type = getattr(request, "param", "llama")
    longer = {"max_position_embeddings": 2048} if model_type == "llama" else {}
    return tiny_models.save(model_type, tmp_path_factory.mktemp(model_type), **longer)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return load_engine(checkpoint)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    """Greedy tokens of transformers, one prompt at a time, no stop at EOS."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    outputs = []
    for prompt in prompts(*LENGTHS):
        generated = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NUM_OUTPUT,
            min_new_tokens=NUM_OUTPUT,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        outputs.append(generated[0, len(prompt) :].tolist())
    return outputs


def seeded(seed: int) -> SamplingParameters:
    return SamplingParameters(do_sample=True, temperature=0.9, top_k=50, top_p=0.95, seed=seed)


def outputs(streams: list[Stream], num_output: int = NUM_OUTPUT) -> list[list[int]]:
    return [stream.output[:num_output] for stream in streams]


@KINDS
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("chunk", [1000, 7, 1])
def test_greedy_tokens_equal_transformers(
    engine: Engine, expected: list[list[int]], chunk: int, depth: int
) -> None:
    """A batch of prompts, whole and in odd chunks. depth 2: no result is read before the next plan is due."""
    streams = [Stream(prompt) for prompt in prompts(*LENGTHS)]
    generate(engine, streams, NUM_OUTPUT, chunk=chunk, depth=depth)
    assert outputs(streams) == expected


@KINDS
def test_sequences_that_come_and_go_do_not_disturb_others(engine: Engine, expected: list[list[int]]) -> None:
    engine.forget()
    driver = Driver(engine, chunk=5, depth=2)
    streams = [Stream(prompt) for prompt in prompts(*LENGTHS)]
    for i, stream in enumerate(streams):
        driver.add(i, stream)
        driver.add(100 + i, Stream([9, 9, 9]))
        driver.step()
        if i % 2:
            driver.drop(100 + i)
    driver.run(NUM_OUTPUT)
    assert outputs(streams) == expected


def test_a_prefix_in_shared_blocks_is_not_computed_again(engine: Engine, expected: list[list[int]]) -> None:
    """The second sequence starts on blocks that the first has filled, and never writes them."""
    engine.forget()
    driver = Driver(engine, depth=2)
    first = Stream(prompts(*LENGTHS)[-1])
    driver.add(1, first)
    driver.run(2)
    shared = first.blocks[: len(first.prompt) // BLOCK_SIZE - 1]
    before = [store[shared].clone() for store in engine.kv_cache.stores]
    second = Stream(first.prompt)
    driver.add(2, second, shared_blocks=shared)
    driver.run(NUM_OUTPUT)
    assert outputs([first, second]) == [expected[-1]] * 2
    after = [store[shared] for store in engine.kv_cache.stores]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@KINDS
@pytest.mark.parametrize("sampling", [SamplingParameters(), seeded(7)], ids=["greedy", "seeded"])
def test_a_preempted_sequence_goes_on_as_if_nothing_had_happened(
    engine: Engine, sampling: SamplingParameters
) -> None:
    streams = [Stream(prompt, sampling) for prompt in prompts(9, 17, 3)]
    undisturbed = outputs(
        generate(engine, [Stream(prompt, sampling) for prompt in prompts(9, 17, 3)], 16), 16
    )
    engine.forget()
    driver = Driver(engine, depth=2)
    for i, stream in enumerate(streams):
        driver.add(i, stream)
    driver.run(6)
    driver.drop(1)  # two plans were in flight: what they sampled for it is gone
    driver.step()
    driver.step()
    driver.add(1, streams[1])
    driver.run(16)
    assert outputs(streams, 16) == undisturbed
    engine.forget()  # a new stream to a new router: everything is added from tokens
    for stream in streams:
        del stream.output[5:]
    driver = Driver(engine, depth=2, chunk=4)
    for i, stream in enumerate(streams):
        driver.add(i, stream)
    driver.run(16)
    assert outputs(streams, 16) == undisturbed


@KINDS
def test_a_seeded_sequence_samples_the_same_alone_and_in_a_batch(engine: Engine) -> None:
    many = [Stream(prompt, seeded(seed)) for seed, prompt in enumerate(prompts(*range(1, 33)))]
    generate(engine, many, 10, chunk=9, depth=2)
    for i in (0, 13, 31):
        alone = Stream(many[i].prompt, many[i].sampling)
        generate(engine, [alone], 10)
        assert alone.output == many[i].output
        torch.testing.assert_close(
            torch.tensor(alone.logprobs), torch.tensor(many[i].logprobs), atol=1e-4, rtol=0
        )


def test_choices_of_one_seed_differ(engine: Engine) -> None:
    streams = [
        Stream(prompts(12)[0], SamplingParameters(do_sample=True, seed=3, choice=choice))
        for choice in range(4)
    ]
    generate(engine, streams, 8)
    assert len({tuple(stream.output) for stream in streams}) == 4


@KINDS
@pytest.mark.parametrize("chunk", [1000, 6, 1])
def test_prompt_and_output_logprobs_equal_transformers(engine: Engine, checkpoint: Path, chunk: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    asking = [i % 2 == 0 for i in range(len(LENGTHS))]
    streams = [
        Stream(prompt, prompt_logprobs=asks, top_n=3 if asks else 0)
        for prompt, asks in zip(prompts(*LENGTHS), asking, strict=True)
    ]
    generate(engine, streams, 4, chunk=chunk, depth=2)
    for stream, asks in zip(streams, asking, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([stream.prompt + stream.output])).logits[0]
        logprobs = logits.log_softmax(-1)
        following = torch.tensor(stream.prompt[1:] + stream.output)
        theirs = logprobs[:-1].gather(1, following[:, None])[:, 0]
        num_prompt = len(stream.prompt)
        torch.testing.assert_close(torch.tensor(stream.logprobs), theirs[num_prompt - 1 :], atol=1e-4, rtol=0)
        assert list(stream.of_prompt) == (list(range(1, num_prompt)) if asks else [])
        if asks and num_prompt > 1:
            ours = torch.tensor(list(stream.of_prompt.values()))
            torch.testing.assert_close(ours, theirs[: num_prompt - 1], atol=1e-4, rtol=0)
        for step, top in enumerate(stream.top):
            best = logprobs[num_prompt - 1 + step].topk(3)
            assert [token_id for token_id, _ in top] == (best.indices.tolist() if asks else [])


@KINDS
def test_prompt_logprobs_of_a_long_prompt_never_need_all_its_logits_at_once(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_engine(checkpoint, num_blocks=400, max_total_tokens=1500)
    sizes: list[int] = []
    model = engine.model

    class Watched:
        kv_shape = model.kv_shape

        @staticmethod
        def forward(inputs, kv_cache):  # type: ignore[no-untyped-def]
            sizes.append(len(inputs.logit_indices))
            return model.forward(inputs, kv_cache)

    monkeypatch.setattr(engine, "model", Watched)
    long, other = prompts(1300, 20)
    streams = [Stream(long, prompt_logprobs=True), Stream(other, prompt_logprobs=True), Stream(other)]
    generate(engine, streams, 2)
    assert max(sizes) <= MAX_PROMPT_LOGITS + len(streams)
    monkeypatch.setattr(engine, "model", model)
    in_chunks = [Stream(long, prompt_logprobs=True), Stream(other, prompt_logprobs=True), Stream(other)]
    generate(engine, in_chunks, 2, chunk=200)
    for whole, chunked in zip(streams, in_chunks, strict=True):
        assert whole.output == chunked.output
        assert list(whole.of_prompt) == list(chunked.of_prompt)
        torch.testing.assert_close(
            torch.tensor(list(whole.of_prompt.values())), torch.tensor(list(chunked.of_prompt.values()))
        )


# --- sequences that fail alone


def bad_sequences() -> dict[str, AddSequence]:
    one = np.array([1, 2, 3])
    none = np.empty(0, np.int64)
    return {
        "token id 259 is not below": AddSequence(9, np.array([1, 259]), none),
        "the prompt has no token": AddSequence(9, none, none),
        "more than max_total_tokens = 200": AddSequence(9, np.ones(203, np.int64), none),
        "num_cached_tokens is 3": AddSequence(9, one, none, num_cached_tokens=3),
        "`temperature` must be positive": AddSequence(
            9, one, none, sampling=SamplingParameters(temperature=0)
        ),
        "sequence 1 is alive already": AddSequence(1, one, none),
    }


@pytest.mark.parametrize("message", bad_sequences())
def test_a_sequence_that_cannot_be_added_fails_alone(
    engine: Engine, expected: list[list[int]], message: str
) -> None:
    engine.forget()
    driver = Driver(engine, depth=2)
    streams = [Stream(prompt) for prompt in prompts(*LENGTHS)]
    for i, stream in enumerate(streams):
        driver.add(i + 10, stream)
    victim = Stream([5])
    if "alive" in message:
        driver.add(1, victim)
        driver.step()
    bad = bad_sequences()[message]
    driver.streams[bad.sequence_id] = victim
    victim.num_known = victim.num_computed + 1
    driver._add.append(bad)
    driver.run(NUM_OUTPUT)
    assert message in (victim.error or "")
    assert outputs(streams) == expected
    assert sum(len(result.failed) for result in driver.results) == 1  # told once, though the next plan ran it


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({7: (1, [])}, "there is no sequence 7"),
        ({1: (4, [0])}, "the plan runs 4 tokens, and 3 are to compute"),
        ({1: (0, [0])}, "the plan runs 0 tokens, and 3 are to compute"),
        ({1: (3, [])}, "0 blocks of 8 do not suit 3 tokens"),
        ({1: (3, [256])}, "block id 256 is not below the number of blocks, 256"),
        ({1: (3, list(range(40)))}, "40 blocks of 8 do not suit 3 tokens"),
    ],
)
def test_a_sequence_that_cannot_be_run_fails_alone(
    engine: Engine, run: dict[int, tuple[int, list[int]]], message: str
) -> None:
    engine.forget()
    three = np.array([1, 2, 3])
    add = [AddSequence(i, three, np.empty(0, np.int64)) for i in (1, 2)]
    result = engine.finish(engine.step(make_plan(1, add=add, run=run | {2: (3, [50])})))
    assert [failure.message for failure in result.failed] == [message]
    assert result.sequence_ids == [2]
    again = engine.finish(engine.step(make_plan(2, run={next(iter(run)): (1, []), 2: (1, [])})))
    assert again.failed == []  # told once
    assert again.sequence_ids == [2]


@pytest.mark.parametrize("model_type", EMBEDDINGS)
def test_scores_that_are_not_finite_fail_their_sequence_alone(model_type: str, tmp_path: Path) -> None:
    """One prompt ends with a token whose embedding is NaN.

    Its neighbours generate what they would have without it.
    """
    checkpoint = tiny_models.save(model_type, tmp_path)
    weights = load_file(checkpoint / "model.safetensors")
    weights[EMBEDDINGS[model_type]][255] = float("nan")
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    engine = load_engine(checkpoint)
    healthy = [[token if token != 255 else 254 for token in prompt] for prompt in prompts(*LENGTHS)]
    alone = generate(engine, [Stream(prompt) for prompt in healthy], NUM_OUTPUT)
    engine.forget()
    driver = Driver(engine, depth=2)
    streams = [Stream(prompt) for prompt in healthy]
    poisoned = Stream([3, 4, 255])
    for i, stream in enumerate(streams):
        driver.add(i, stream)
    driver.add(50, poisoned)
    driver.step()
    driver.step()
    driver.step()
    driver.add(51, Stream([7] * 30))  # takes blocks that the poisoned one leaves
    driver.run(NUM_OUTPUT)
    assert poisoned.error == "the model's scores for this sequence are not finite"
    assert poisoned.output == []
    assert outputs(streams) == outputs(alone)
    assert 50 not in engine.slots.slot_of


@pytest.mark.parametrize("depth", [1, 2])
def test_a_sequence_with_spoilt_blocks_does_better_with_fresh_ones(tmp_path: Path, depth: int) -> None:
    """The KV of a shared prefix is NaN. From its tokens the sequence is what it was."""
    engine = load_engine(tiny_models.save("llama", tmp_path))
    (prompt,) = prompts(2 * BLOCK_SIZE + 3)
    (alone,) = generate(engine, [Stream(prompt)], NUM_OUTPUT)
    engine.forget()
    driver = Driver(engine, depth=depth)
    first, neighbour = Stream(prompt), Stream([7] * 5)
    driver.add(1, first)
    driver.add(2, neighbour)
    driver.step()
    driver.drop(1)
    for store in engine.kv_cache.stores:
        store[first.blocks[:1]] = float("nan")
    sharer = Stream(prompt)
    driver.add(3, sharer, shared_blocks=first.blocks[:2])
    while sharer.error is None:
        driver.step()
    assert sharer.output == []
    again = Stream(prompt)
    driver._drop.append(3)
    driver.add(3, again)
    driver.run(NUM_OUTPUT)
    assert again.output[:NUM_OUTPUT] == alone.output  # the lookahead may have brought one more
    assert neighbour.error is None
