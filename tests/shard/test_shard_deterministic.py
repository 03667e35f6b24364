"""--deterministic: whatever the schedule, a sequence's tokens and logprobs are equal bit for bit.

Sequences run under random schedules: in any company, prompts in chunks of any size, blocks of others as their
prefix, preempted and added again, one plan ahead or not. Each is held against itself alone, its prompt whole.
"""

import random
import socket
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor

import tiny_models
from engine_driver import BLOCK_SIZE, Driver, Stream, generate, load_engine, prompts
from tgi_shard import same_bits
from tgi_shard.distributed import SINGLE, close_group, init_group
from tgi_shard.engine import Engine
from tgi_shard.layers.activation import ACTIVATIONS
from tgi_shard.layers.elementwise import evenly
from tgi_shard.models.registry import UnsupportedModel, load_model
from tgi_shard.quantization.deterministic import DeterministicDense
from tgi_shard.sampling.filters import row_sums
from tgi_shard.sampling.history import History
from tgi_shard.sampling.parameters import COLUMNS, SamplingParameters
from tgi_shard.sampling.sampler import Sampler
from tgi_shard.weights.checkpoint import Checkpoint

LENGTHS = (1, 5, BLOCK_SIZE, 17, 40, 70)
NUM_OUTPUT = 14
CHUNKS = (1, 3, 7, 16, 33, 1000)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
FAMILIES = [
    pytest.param(family, marks=[] if family in tiny_models.REPRESENTATIVES else pytest.mark.matrix)
    for family in tiny_models.DECODERS
]
VARIANTS = [
    pytest.param(name, marks=pytest.mark.matrix)
    for name, (model_type, _) in tiny_models.VARIANTS.items()
    if model_type not in tiny_models.RECURRENT
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def made(name: str) -> Path:
        model_type, fields = tiny_models.VARIANTS.get(name, (name, {}))
        return tiny_models.save(model_type, tmp_path_factory.mktemp(name), **fields)

    return made


def streams() -> list[Stream]:
    """Greedy ones and sampled ones; with alternatives, with prompt logprobs, with penalties."""
    sampled = SamplingParameters(do_sample=True, temperature=1.3, top_p=0.95, typical_p=0.9)
    kinds = [
        {"top_n": 3},
        {"sampling": sampled, "prompt_logprobs": True},
        {"sampling": SamplingParameters(repetition_penalty=1.3, frequency_penalty=0.2)},
    ]
    return [Stream(prompt, **kinds[i % 3]) for i, prompt in enumerate(prompts(*LENGTHS))]  # type: ignore[arg-type]


def alone(engine: Engine) -> list[Stream]:
    return [generate(engine, [stream], NUM_OUTPUT)[0] for stream in streams()]


def under_a_schedule(engine: Engine, seed: int) -> list[Stream]:
    """The same streams in random company."""
    draw = random.Random(seed)
    engine.forget()
    driver = Driver(engine, chunk=draw.choice(CHUNKS), depth=draw.choice((1, 2)), seed=seed)
    found = streams()
    waiting = list(enumerate(found))
    draw.shuffle(waiting)
    while waiting or any(len(stream.output) < NUM_OUTPUT for stream in driver.streams.values()):
        if waiting and (draw.random() < 0.5 or not driver.streams):
            driver.add(*waiting.pop())
        if draw.random() < 0.1:
            driver.chunk = draw.choice(CHUNKS)
        driver.step()
        if draw.random() < 0.2:  # preempted, or its shard was killed: what it said is a prompt now
            sequence_id = draw.choice(list(driver.streams))
            driver.drain()
            waiting.append((sequence_id, driver.drop(sequence_id)))
    driver.drain()
    return found


def answers(found: list[Stream]) -> list[tuple[object, ...]]:
    """All that a client sees."""
    return [
        (stream.output[:NUM_OUTPUT], stream.logprobs[:NUM_OUTPUT], stream.top[:NUM_OUTPUT], stream.of_prompt)
        for stream in found
    ]


@DTYPES
@pytest.mark.parametrize("name", FAMILIES + VARIANTS)
def test_a_schedule_changes_no_bit(checkpoint: Callable[[str], Path], name: str, dtype: torch.dtype) -> None:
    engine = load_engine(checkpoint(name), dtype=dtype, deterministic=True)
    expected = answers(alone(engine))
    for seed in range(2):
        assert answers(under_a_schedule(engine, seed)) == expected, seed


@DTYPES
def test_without_it_a_schedule_does(checkpoint: Callable[[str], Path], dtype: torch.dtype) -> None:
    """Or the test above would prove nothing."""
    engine = load_engine(checkpoint("llama"), dtype=dtype)
    assert answers(under_a_schedule(engine, 0)) != answers(alone(engine))


@DTYPES
def test_blocks_of_another_are_as_good_as_ones_own(
    checkpoint: Callable[[str], Path], dtype: torch.dtype
) -> None:
    engine = load_engine(checkpoint("llama"), dtype=dtype, deterministic=True)
    prompt = prompts(70)[0]
    expected = answers(generate(engine, [Stream(prompt)], NUM_OUTPUT))
    engine.forget()
    driver = Driver(engine, chunk=9)
    first = Stream(prompt)
    driver.add(1, first)
    driver.run(3)
    for num_blocks in (1, 4, 8):
        second = Stream(prompt)
        driver.add(1 + num_blocks, second, shared_blocks=first.blocks[:num_blocks])
        driver.run(NUM_OUTPUT)
        assert answers([second]) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_it_computes_the_same_model(checkpoint: Callable[[str], Path], name: str) -> None:
    """Up to rounding; without it, the model is held against transformers elsewhere."""
    of_prompts = []
    for deterministic in (False, True):
        engine = load_engine(checkpoint(name), deterministic=deterministic)
        (stream,) = generate(engine, [Stream(prompts(70)[0], prompt_logprobs=True)], 1)
        of_prompts.append(stream.of_prompt)
    assert of_prompts[1] == pytest.approx(of_prompts[0], abs=1e-4)


# --- its parts


@pytest.fixture(
    params=[1, *(pytest.param(count, marks=pytest.mark.matrix) for count in (2, 3))], ids="{} threads".format
)
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """More than one only in the matrix: with more threads than idle cores each call waits for its turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_a_schedule_changes_no_bit_with_several_threads(
    checkpoint: Callable[[str], Path], num_threads: int, name: str
) -> None:
    engine = load_engine(checkpoint(name), deterministic=True)
    assert answers(under_a_schedule(engine, 5)) == answers(alone(engine))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_number_has_one_activation(num_threads: int, dtype: torch.dtype) -> None:
    x = (torch.randn(700, 137, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    for name, function in (ACTIVATIONS | {"sigmoid": torch.sigmoid, "softplus": F.softplus}).items():
        even = evenly(function)
        whole = even(x)
        torch.testing.assert_close(whole, function(x), rtol=1e-2, atol=1e-6)
        for start, stop in [(0, 1), (1, 4), (100, 164), (5, 244), (3, 700), *((i, i + 1) for i in range(50))]:
            assert torch.equal(even(x[start:stop]), whole[start:stop]), (name, start, stop)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_in", "num_out"), [(7, 96), (64, 6), (64, 259), (600, 250)])
def test_a_row_has_one_product(num_threads: int, num_in: int, num_out: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, num_in, generator=generator).to(dtype)
    method = DeterministicDense("in_out")
    weight = torch.randn(num_in, num_out, generator=generator).to(dtype)
    bias = torch.randn(num_out, generator=generator).to(dtype)
    tensors = method.prepare({"weight": weight})
    whole = method.matmul(x, tensors, bias)
    exact = (x.float() @ weight.float() + bias.float()).to(dtype)
    torch.testing.assert_close(whole, exact, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-4)
    for start, stop in [(0, 0), (0, 17), (1, 4), (100, 164), (5, 244), *((i, i + 1) for i in range(30))]:
        assert torch.equal(method.matmul(x[start:stop], tensors, bias), whole[start:stop]), (start, stop)


def test_a_row_of_scores_has_one_sum(num_threads: int) -> None:
    scores = torch.randn(5, 50_000, generator=torch.Generator().manual_seed(0))
    whole = row_sums(scores)
    torch.testing.assert_close(whole, scores.double().sum(-1, keepdim=True).float(), rtol=1e-5, atol=1e-2)
    for row in range(len(scores)):
        assert torch.equal(row_sums(scores[row : row + 1]), whole[row : row + 1])


def test_a_row_has_one_choice(num_threads: int) -> None:
    """Of all that a client may ask for, in a batch and alone."""
    kinds: list[dict[str, Any]] = [
        {"typical_p": 0.7},
        {"top_p": 0.8, "temperature": 1.4, "repetition_penalty": 1.2},
        {"min_p": 0.02, "frequency_penalty": 0.3},
        {"top_k": 9, "output_frequency_penalty": 0.4, "output_presence_penalty": 0.2},
    ]
    count, vocab_size = 40, 33_000
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(count, vocab_size, generator=generator) * 3
    token_ids = torch.randint(0, vocab_size, (count, 60), generator=generator).int()
    rows = [SamplingParameters(do_sample=True, seed=i, **kinds[i % 4]).row() for i in range(count)]
    parameters = np.array(rows, COLUMNS)

    def choose(chosen: np.ndarray) -> list[tuple[object, ...]]:
        prompt_lens, num_unsaid = np.full(len(chosen), 4), np.zeros(len(chosen), np.int64)
        history = History(token_ids, chosen, chosen + 5, prompt_lens, num_unsaid)
        top_n = np.full(len(chosen), 3)
        sampled = Sampler()(scores[chosen].clone(), parameters[chosen], history, top_n)
        assert sampled.top_tokens is not None
        tops = sampled.top_tokens.lists()
        ids, logprobs = sampled.token_ids.tolist(), sampled.logprobs.tolist()
        return [(ids[row], logprobs[row], tops[row]) for row in range(len(chosen))]

    together = choose(np.arange(count))
    for row in range(count):
        assert choose(np.array([row])) == [together[row]]


def test_sizes_that_sum_in_another_order_are_not_taken() -> None:
    x, weight = same_bits.cancelling(same_bits.NUM_EXAMPLES, 50, 40, torch.float32, torch.device("cpu"))

    def products(examples: Tensor, order: Tensor) -> Tensor:
        total = torch.zeros(len(examples), len(weight))
        for place in order.tolist():
            total += x[examples][:, place, None] * weight[:, place]
        return total

    forward, backward = torch.arange(40), torch.arange(40).flip(0)

    def run(examples: Tensor) -> Tensor:
        return products(examples, forward if len(examples) in (16, 4, 64) else backward)

    assert same_bits.agreeing(run, 16, (1, 4, 8, 64)).sizes == (4, 16, 64)

    def by_place(examples: Tensor) -> Tensor:
        return torch.cat((products(examples[:5], forward), products(examples[5:], backward)))

    with pytest.raises(same_bits.NotReproducible, match="depends on its place among 16"):
        same_bits.agreeing(by_place, 16, (1, 4))


def test_a_call_is_cut_into_sizes() -> None:
    sizes = same_bits.Sizes((2, 8, 16))
    seen = []

    def double(x: Tensor) -> Tensor:
        seen.append(len(x))
        return 2 * x

    for num_rows, expected in ((0, [2]), (1, [2]), (3, [8]), (16, [16]), (37, [16, 16, 8])):
        seen.clear()
        x = torch.randn(num_rows + 1, 3)[1:]
        assert torch.equal(sizes.call(double, x), 2 * x)
        assert seen == expected


# --- several ranks


def _sum(rank: int, port: int, folder: Path, num_ranks: int) -> None:
    torch.set_num_threads(1)
    group = init_group(rank, num_ranks, torch.device("cpu"), "127.0.0.1", port, sums_in_order=True)
    try:
        x = torch.randn(37, 48, generator=torch.Generator().manual_seed(rank))
        for dtype in (torch.float32, torch.bfloat16):
            whole = group.all_reduce(x.to(dtype, copy=True))
            for start, stop in ((0, 1), (1, 2), (3, 8), (20, 37)):
                part = group.all_reduce(x[start:stop].to(dtype, copy=True))
                assert torch.equal(part, whole[start:stop])
            torch.save(whole, folder / f"{rank}-{dtype}.pt")
    finally:
        close_group(group)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_row_has_one_sum_over_ranks(tmp_path: Path, num_ranks: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    arguments = (port, tmp_path, num_ranks)
    torch.multiprocessing.start_processes(_sum, arguments, nprocs=num_ranks, start_method="spawn")
    for dtype in (torch.float32, torch.bfloat16):
        parts = [
            torch.randn(37, 48, generator=torch.Generator().manual_seed(rank)).to(dtype)
            for rank in range(num_ranks)
        ]
        expected = torch.stack(parts).double().sum(0).to(dtype)
        for rank in range(num_ranks):
            torch.testing.assert_close(torch.load(tmp_path / f"{rank}-{dtype}.pt"), expected)


# --- what it is not there for


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("mamba2", "are recurrent"), ("t5", "have an encoder"), ("helium", "run by transformers' own code")],
)
def test_what_it_cannot_do_is_refused_before_weights_are_read(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, model_type: str, reason: str
) -> None:
    path = checkpoint(model_type)
    monkeypatch.setattr(Checkpoint, "open", lambda *_: pytest.fail("the weights were opened"))
    with pytest.raises(
        UnsupportedModel, match=f"--deterministic is not available for {model_type} .*{reason}"
    ):
        load_model(path, dtype=None, device=torch.device("cpu"), group=SINGLE, deterministic=True)
