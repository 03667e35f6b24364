"""Choosing tokens: TGI's formulas and examples, transformers as oracle, draws that hang on their key."""

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from tgi_shard.sampling import filters, penalties, random
from tgi_shard.sampling.bias import LogitBias
from tgi_shard.sampling.history import History
from tgi_shard.sampling.logprobs import TopTokens, token_logprobs
from tgi_shard.sampling.parameters import COLUMNS, SamplingParameters
from tgi_shard.sampling.sampler import NOT_FINITE, Sampled, Sampler
from tgi_shard.sampling.watermark import green_token_ids

VOCAB_SIZE = 1237  # not a multiple of anything that the code cuts by
INFINITY = float("inf")


def history_of(rows: list[list[int]], prompt_lens: list[int] | None = None) -> History:
    """Slots in reverse order, with rubbish behind every row's end."""
    width = max(map(len, rows)) + 3
    token_ids = torch.full((len(rows), width), 1, dtype=torch.int32)
    slots = np.arange(len(rows))[::-1].copy()
    for slot, row in zip(slots, rows, strict=True):
        token_ids[slot, : len(row)] = torch.tensor(row)
    lens = np.array([len(row) for row in rows])
    prompt_lens = lens if prompt_lens is None else np.array(prompt_lens)
    return History(token_ids, slots, lens, prompt_lens, np.zeros_like(lens))


def sample(
    scores: Tensor,
    parameters: SamplingParameters | list[SamplingParameters],
    history: History | None = None,
    top_n: int = 0,
    biases: list[LogitBias | None] | None = None,
) -> Sampled:
    each = parameters if isinstance(parameters, list) else [parameters] * len(scores)
    columns = np.array([one.row() for one in each], dtype=COLUMNS)
    history = history or history_of([[0]] * len(scores))
    return Sampler()(scores.clone(), columns, history, np.full(len(scores), top_n), biases)


def processed(scores: Tensor, parameters: SamplingParameters, history: History | None = None) -> list[float]:
    """The log-softmax of one row's processed scores, read back through the alternatives."""
    top = sample(scores, parameters, history, top_n=scores.shape[1]).top_tokens
    assert top is not None
    logprobs = [-INFINITY] * scores.shape[1]
    for token_id, logprob in top.lists()[0]:
        logprobs[token_id] = logprob
    return logprobs


# --- the formulas


def test_repetition_penalty_example() -> None:
    scores, seen = torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([[0, 2]])
    assert penalties.penalise_repetition(scores, seen, torch.tensor([2.0])).tolist() == [[1.0, 1.0, -2.0]]
    tied = sample(
        torch.tensor([[2.0, 1.0, -1.0]]), SamplingParameters(repetition_penalty=2.0), history_of([[0, 2]])
    )
    assert tied.token_ids.tolist() == [0]  # the first of the largest


def test_frequency_penalty_example() -> None:
    token_ids, is_real, _ = history_of([[5, 5, 7, 9]]).padded()
    scores = penalties.penalise_frequency(torch.zeros(1, 10), token_ids, is_real, torch.tensor([0.5]))
    assert scores.tolist() == [[0, 0, 0, 0, 0, -0.25, 0, -0.125, 0, -0.125]]


def test_top_p_example() -> None:
    scores = torch.tensor([[0.5, 0.3, 0.2]]).log()
    kept = filters.mask_top_p(scores, torch.tensor([0.6])).isfinite()
    assert kept.tolist() == [[True, True, False]]


def test_top_k_example_keeps_ties() -> None:
    kept = filters.mask_top_k(torch.tensor([[3.0, 2.0, 2.0, 1.0]]), np.array([2])).isfinite()
    assert kept.tolist() == [[True, True, True, False]]


def test_output_penalties_count_the_output_alone() -> None:
    token_ids, _, is_output = history_of([[3, 3, 4, 4, 4, 6]], prompt_lens=[3]).padded()
    scores = penalties.penalise_output(
        torch.zeros(1, 8), token_ids, is_output, torch.tensor([0.25]), torch.tensor([1.0])
    )
    assert scores.tolist() == [[0, 0, 0, 0, -1.5, 0, -1.25, 0]]


def test_padding_is_never_a_seen_token() -> None:
    """Rows of different lengths; what stands behind the end of the short one, and id 0, stay as they were."""
    short, long = [7], [2, 3, 4, 5, 6, 6]
    everything = SamplingParameters(
        repetition_penalty=3.0,
        frequency_penalty=1.0,
        output_frequency_penalty=0.5,
        output_presence_penalty=0.5,
    )
    scores = torch.ones(2, 9)
    logprobs = processed(scores, everything, history_of([short, long], prompt_lens=[0, 0]))
    assert len({logprobs[i] for i in range(9) if i != 7}) == 1
    assert logprobs[7] < logprobs[0]


@pytest.mark.parametrize("seed", range(3))
def test_processors_agree_with_transformers(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in (1, 5, 40)]
    scores = torch.randn(3, VOCAB_SIZE, generator=generator) * 4
    cases = [
        (SamplingParameters(repetition_penalty=1.3), transformers.RepetitionPenaltyLogitsProcessor(1.3)),
        (SamplingParameters(temperature=0.7), transformers.TemperatureLogitsWarper(0.7)),
        (SamplingParameters(top_k=17), transformers.TopKLogitsWarper(17)),
        (SamplingParameters(top_k=VOCAB_SIZE + 5), transformers.TopKLogitsWarper(VOCAB_SIZE + 5)),
        (SamplingParameters(top_p=0.9), transformers.TopPLogitsWarper(0.9)),
        (SamplingParameters(top_p=0.05), transformers.TopPLogitsWarper(0.05)),
        (SamplingParameters(min_p=0.1), transformers.MinPLogitsWarper(0.1)),
        (SamplingParameters(min_p=1.0), transformers.MinPLogitsWarper(1.0)),
        (SamplingParameters(typical_p=0.9), transformers.TypicalLogitsWarper(0.9)),
        (SamplingParameters(typical_p=0.2), transformers.TypicalLogitsWarper(0.2)),
    ]
    for parameters, theirs in cases:
        for i, row in enumerate(rows):
            expected = theirs(torch.tensor([row]), scores[i : i + 1].clone()).log_softmax(-1)[0]
            ours = torch.tensor(processed(scores[i : i + 1], parameters, history_of([row])))
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_the_order_is_that_of_tgi() -> None:
    """All at once equals transformers' processors one after the other in TGI's order."""
    row = [5, 9, 9, 30]
    scores = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(5)) * 4
    expected = scores.clone()
    green = green_token_ids(30, VOCAB_SIZE, 0.5)
    expected[0, green] += 2.0
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([row]), expected)
    expected -= 0.8 * torch.bincount(torch.tensor(row), minlength=VOCAB_SIZE) / len(row)
    for warper in (
        transformers.TemperatureLogitsWarper(0.6),
        transformers.TopKLogitsWarper(300),
        transformers.TopPLogitsWarper(0.95),
        transformers.MinPLogitsWarper(0.02),
        transformers.TypicalLogitsWarper(0.9),
    ):
        expected = warper(torch.tensor([row]), expected)
    parameters = SamplingParameters(
        watermark=True,
        repetition_penalty=1.5,
        frequency_penalty=0.8,
        temperature=0.6,
        top_k=300,
        top_p=0.95,
        typical_p=0.9,
        min_p=0.02,
    )
    ours = torch.tensor(processed(scores, parameters, history_of([row])))
    torch.testing.assert_close(ours, expected.log_softmax(-1)[0], rtol=1e-4, atol=1e-4)


def test_a_logit_bias_is_added_before_anything_else() -> None:
    scores = torch.randn(3, VOCAB_SIZE, generator=torch.Generator().manual_seed(4))
    bias = LogitBias(np.array([7, 900, 1236]), np.array([3.0, -100.0, 0.5], np.float32))
    other = LogitBias(np.array([7]), np.array([100.0], np.float32))
    parameters = SamplingParameters(temperature=0.7, top_k=40, repetition_penalty=1.4)
    biased = scores.clone()
    biased[0, [7, 900, 1236]] += torch.tensor([3.0, -100.0, 0.5])
    biased[2, 7] += 100
    for each in (parameters, SamplingParameters(), [parameters, SamplingParameters(), parameters]):
        expected = sample(biased, each, top_n=5)
        got = sample(scores, each, top_n=5, biases=[bias, None, other])
        assert got.token_ids.equal(expected.token_ids)
        assert got.logprobs.equal(expected.logprobs)
        assert got.top_tokens is not None
        assert expected.top_tokens is not None
        assert got.top_tokens.lists() == expected.top_tokens.lists()
    assert got.token_ids[2] == 7


def test_an_impossible_logit_bias_is_told() -> None:
    fine = LogitBias(np.array([5]), np.array([1.0], np.float32))
    assert fine.problem(vocab_size=6) is None
    assert "token id 5" in (fine.problem(vocab_size=5) or "")
    assert "finite" in (LogitBias(np.array([5]), np.array([np.nan], np.float32)).problem(6) or "")


def test_filters_never_drop_the_best_token() -> None:
    scores = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    for parameters in (
        SamplingParameters(top_k=1),
        SamplingParameters(top_p=1e-6),
        SamplingParameters(min_p=1.0),
    ):
        best = sample(scores, parameters)
        assert best.token_ids.tolist() == scores.argmax(-1).tolist()
        assert best.logprobs.tolist() == [0.0] * 4
    flat = torch.zeros(1, VOCAB_SIZE)  # ties all the way
    assert all(np.isfinite(processed(flat, SamplingParameters(top_p=0.5))))
    assert any(np.isfinite(processed(scores[:1], SamplingParameters(typical_p=1e-6))))


def test_watermark_favours_its_green_list() -> None:
    scores = torch.zeros(1, VOCAB_SIZE)
    logprobs = torch.tensor(processed(scores, SamplingParameters(watermark=True), history_of([[4, 77]])))
    generator = torch.Generator().manual_seed(15485863 * 77)
    green = torch.randperm(VOCAB_SIZE, generator=generator)[: VOCAB_SIZE // 2]
    is_green = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    is_green[green] = True
    assert bool(((logprobs - logprobs.min()) > 1.9).equal(is_green))


# --- what is reported


def test_logprobs_are_those_of_the_processed_scores() -> None:
    scores = torch.randn(6, VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 5
    plain = sample(scores, SamplingParameters())
    expected = scores.log_softmax(-1)
    torch.testing.assert_close(plain.logprobs, expected.gather(1, plain.token_ids[:, None])[:, 0])
    cold = sample(scores, SamplingParameters(temperature=0.5))
    expected = (scores / 0.5).log_softmax(-1)
    torch.testing.assert_close(
        cold.logprobs, expected.gather(1, cold.token_ids[:, None])[:, 0], atol=1e-5, rtol=1e-5
    )


def test_top_tokens_include_ties_and_never_what_was_filtered() -> None:
    scores = torch.full((1, 50), -1.0)
    scores[0, [3, 8]] = torch.tensor([5.0, 4.0])
    scores[0, 20:40] = 2.0  # more ties with the third than are fetched at first
    found = TopTokens.find(scores, scores.logsumexp(-1), [0], [3]).lists()[0]
    assert [token_id for token_id, _ in found] == [3, 8, *range(20, 40)]
    torch.testing.assert_close(
        torch.tensor([logprob for _, logprob in found]), scores.log_softmax(-1)[0, [3, 8, *range(20, 40)]]
    )
    alone = sample(scores, SamplingParameters(top_k=1), top_n=5).top_tokens
    assert alone is not None
    assert alone.lists() == {0: [(3, 0.0)]}
    two = sample(scores, SamplingParameters(), top_n=2).top_tokens
    assert two is not None
    assert [token_id for token_id, _ in two.lists()[0]] == [3, 8]


def test_token_logprobs() -> None:
    logits = torch.randn(150, 77)
    token_ids = torch.randint(77, (150,))
    expected = logits.log_softmax(-1)[torch.arange(150), token_ids]
    torch.testing.assert_close(token_logprobs(logits, token_ids), expected)


def test_rows_that_are_not_finite_are_named_and_harm_nobody() -> None:
    scores = torch.randn(6, VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    expected = sample(scores, SamplingParameters(do_sample=True, top_p=0.9, seed=3))
    bad = scores.clone()
    bad[1] = float("nan")
    bad[2, 40] = float("nan")
    bad[4] = -INFINITY
    for parameters in (
        SamplingParameters(),
        SamplingParameters(do_sample=True, top_p=0.9, seed=3),
        SamplingParameters(do_sample=True, seed=3),
        SamplingParameters(temperature=0.3, top_k=4, typical_p=0.5, repetition_penalty=1.2, watermark=True),
    ):
        result = sample(bad, parameters, top_n=2)
        assert (result.token_ids == NOT_FINITE).tolist() == [False, True, True, False, True, False]
        good = [0, 3, 5]
        assert sample(scores, parameters).token_ids[good].tolist() == result.token_ids[good].tolist()
    assert (
        sample(bad, SamplingParameters(do_sample=True, top_p=0.9, seed=3)).logprobs[0] == expected.logprobs[0]
    )


# --- draws


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers published with Random123
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    bits = random.philox(torch.tensor(counter).repeat(3, 1).T, torch.tensor(key).repeat(3, 1).T)
    assert bits.T.tolist() == [expected] * 3


def test_every_part_of_the_key_matters() -> None:
    def uniform(seed: int, choice: int, position: int) -> float:
        keys = np.array([seed], np.uint64), np.array([choice]), np.array([position])
        return float(random.uniforms(*keys, torch.device("cpu")))

    top = 2**64 - 1
    numbers = {
        uniform(*key)
        for key in [
            (0, 0, 0),
            (1, 0, 0),
            (1 << 32, 0, 0),
            (top, 0, 0),
            (0, 1, 0),
            (0, 0, 1),
            (0, 2**32 - 1, 7),
        ]
    }
    assert len(numbers) == 7
    assert all(0 <= number < 1 for number in numbers)


def test_a_sequence_draws_the_same_alone_and_in_a_batch() -> None:
    num_rows = 200
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(num_rows, VOCAB_SIZE, generator=generator) * 3
    kinds = [
        SamplingParameters(do_sample=True),
        SamplingParameters(do_sample=True, temperature=0.7, top_p=0.9),
        SamplingParameters(),
        SamplingParameters(do_sample=True, top_k=20, repetition_penalty=1.2),
        SamplingParameters(do_sample=True, typical_p=0.8, output_frequency_penalty=0.3),
        SamplingParameters(do_sample=True, watermark=True, frequency_penalty=0.5),
    ]
    each = [
        SamplingParameters(**{name: getattr(kinds[i % 6], name) for name in COLUMNS.names[:10]}, seed=i)
        for i in range(num_rows)
    ]
    rows = [torch.randint(VOCAB_SIZE, (i % 17 + 1,), generator=generator).tolist() for i in range(num_rows)]
    prompt_lens = [max(1, len(row) // 2) for row in rows]
    together = sample(scores, each, history_of(rows, prompt_lens))
    for i in range(0, num_rows, 7):
        alone = sample(scores[i : i + 1], each[i], history_of([rows[i]], [prompt_lens[i]]))
        assert alone.token_ids[0] == together.token_ids[i]
        assert alone.logprobs[0] == together.logprobs[i]


@pytest.mark.parametrize("vocab_size", [3, 512, 513, 2000])
def test_draw_inverts_the_cumulative_distribution(vocab_size: int) -> None:
    probabilities = torch.rand(1, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    probabilities[0, vocab_size // 3 :: 2] = 0
    probabilities[0, -1] = 0
    probabilities /= probabilities.sum()
    ends = probabilities.double().cumsum(1)[0]
    numbers = torch.cat(
        (torch.linspace(0, 1, 997, dtype=torch.float64)[:-1], torch.tensor([1 - 2.0**-53]).double())
    )
    drawn = random.draw(probabilities.expand(len(numbers), -1), numbers)
    assert bool((probabilities[0, drawn] > 0).all())
    expected = torch.searchsorted(ends, numbers * ends[-1], right=True).clamp(max=vocab_size - 2)
    assert (drawn == expected).double().mean() > 0.995  # sums of blocks round differently at the very edges


def test_draws_follow_the_probabilities() -> None:
    """Chi-square over 60,000 positions of one sequence, 99.9th percentile."""
    num_draws = 60_000
    probabilities = torch.tensor([0.3, 0.25, 0.2, 0.1, 0.08, 0.04, 0.02, 0.01])
    spread = torch.zeros(1100)
    places = torch.tensor([0, 3, 510, 511, 512, 800, 1023, 1099])
    spread[places] = probabilities
    positions = np.arange(num_draws)
    uniform = random.uniforms(
        np.full(num_draws, 12345, np.uint64), np.zeros(num_draws), positions, torch.device("cpu")
    )
    drawn = random.draw(spread.expand(num_draws, -1), uniform)
    counts = torch.bincount(drawn, minlength=1100)[places].double()
    assert counts.sum() == num_draws
    expected = probabilities.double() * num_draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3  # 7 degrees of freedom
    serial = np.corrcoef(uniform[:-1].numpy(), uniform[1:].numpy())[0, 1]
    assert abs(serial) < 0.02


def test_draws_of_different_seeds_follow_the_probabilities_too() -> None:
    num_draws = 60_000
    seeds = np.arange(num_draws, dtype=np.uint64)
    uniform = random.uniforms(seeds, np.zeros(num_draws), np.full(num_draws, 4), torch.device("cpu"))
    counts = torch.histc(uniform, bins=20, min=0, max=1)
    expected = num_draws / 20
    assert (
        float(((counts - expected) ** 2 / expected).sum()) < 43.8
    )  # 19 degrees of freedom, 99.9th percentile


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_what_a_cpu_draws() -> None:
    keys = np.arange(1000, dtype=np.uint64) * 7919, np.arange(1000) % 5, np.arange(1000)
    on_cpu, on_gpu = (random.uniforms(*keys, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert on_cpu.equal(on_gpu.cpu())


def test_impossible_parameters_are_named() -> None:
    assert SamplingParameters().problem() is None
    assert "`temperature` must be positive" in (SamplingParameters(temperature=0).problem() or "")
    assert "`top_p`" in (SamplingParameters(top_p=1.5).problem() or "")
    assert "`frequency_penalty`" in (SamplingParameters(frequency_penalty=float("nan")).problem() or "")
