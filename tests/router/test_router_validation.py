"""The rules of a request: exact messages, their order, and what a request holds once it is checked."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny_tokenizers
from tgi_router.errors import ValidationError
from tgi_router.grammar.source import AskedGrammar
from tgi_router.text.tokenizer import Encoded, Tokenizer
from tgi_router.validation import Draft, Limits, Validator, truncated

LIMITS = Limits(
    max_best_of=2,
    max_stop_sequences=4,
    max_top_n_tokens=5,
    max_input_tokens=1000,
    max_total_tokens=3000,
    vocab_size=tiny_tokenizers.VOCAB_SIZE,
    prompt_logprobs=False,
)


@pytest.fixture
async def validator(tmp_path: Path) -> AsyncIterator[Validator]:
    tokenizer = Tokenizer.load(tiny_tokenizers.save(tmp_path), num_workers=1)
    yield Validator(tokenizer, LIMITS, draw_seed=lambda: 7)
    tokenizer.close()


def draft(**fields: Any) -> Draft:
    given: dict[str, Any] = {"inputs": "abc", "add_special_tokens": True} | fields
    return Draft(**given)


async def test_an_encoders_prompt_has_no_logprobs(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizers.save(tmp_path), num_workers=1)
    validator = Validator(tokenizer, replace(LIMITS, prompt_logprobs=True, has_encoder=True))
    with pytest.raises(ValidationError, match="with an encoder, which gives it none"):
        await validator.validate(draft(prompt_logprobs=True))
    (request,) = await validator.validate(draft())
    assert not request.continues_prompt
    tokenizer.close()


async def test_an_image_is_refused_by_a_model_that_takes_images_and_is_text_to_others(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizers.save(tmp_path), num_workers=1)
    prompt = draft(inputs="what is ![](data:image/png;base64,iVBOR)")
    with pytest.raises(ValidationError, match="images are not available yet"):
        await Validator(tokenizer, replace(LIMITS, takes_images=True)).validate(prompt)
    assert await Validator(tokenizer, LIMITS).validate(prompt)
    tokenizer.close()


RULES: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"temperature": 0.0}, "`temperature` must be strictly positive"),
    ({"temperature": -1.0}, "`temperature` must be strictly positive"),
    ({"temperature": 1e-60}, "`temperature` must be strictly positive"),
    ({"temperature": 1e60}, "`temperature` must be a 32-bit float. Given: 1e+60"),
    ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"output_frequency_penalty": -2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"output_presence_penalty": 3.0}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 0.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"top_k": -3}, "`top_k` must be strictly positive"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": ("a",) * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ({"inputs": ""}, "`inputs` cannot be empty"),
    ({"inputs": "é", "add_special_tokens": False}, "`inputs` cannot be empty"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 1000. Given: 0"),
    ({"truncate": 1001}, "`truncate` must be strictly positive and less than 1000. Given: 1001"),
    (
        {"inputs": "x" * 2500, "max_new_tokens": 600},
        "`inputs` tokens + `max_new_tokens` must be <= 3000. "
        "Given: 2501 `inputs` tokens and 600 `max_new_tokens`",
    ),
    (
        {"inputs": "x" * 2500, "max_new_tokens": 9000},
        "`inputs` tokens + `max_new_tokens` must be <= 3000. "
        "Given: 2501 `inputs` tokens and 1024 `max_new_tokens`",
    ),
    (
        {"inputs": "x" * 3500},
        "`inputs` tokens + `max_new_tokens` must be <= 3000. "
        "Given: 3501 `inputs` tokens and 0 `max_new_tokens`",
    ),
    (
        {"inputs": "x" * 1000, "max_new_tokens": 5},
        "`inputs` must have less than 1000 tokens. Given: 1001",
    ),
    ({"grammar": AskedGrammar("regex", "a")}, "grammar is not supported"),
]


@pytest.mark.parametrize(("fields", "message"), RULES, ids=[message[:40] for _, message in RULES])
async def test_messages(validator: Validator, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        await validator.validate(draft(**fields))
    assert str(raised.value) == f"Input validation error: {message}"


async def test_the_first_broken_rule_is_named(validator: Validator) -> None:
    """Take a request that breaks everything and mend it rule by rule."""
    broken: dict[str, Any] = {
        "temperature": 0.0,
        "repetition_penalty": 0.0,
        "frequency_penalty": 9.0,
        "top_p": 2.0,
        "typical_p": 2.0,
        "top_k": 0,
        "max_new_tokens": 0,
        "stop": ("x",) * 9,
        "top_n_tokens": 9,
        "inputs": "",
        "truncate": 0,
        "grammar": AskedGrammar("regex", "a"),
    }
    named = []
    while broken:
        with pytest.raises(ValidationError) as raised:
            await validator.validate(draft(**broken))
        field = next(iter(broken))
        named.append(field)
        assert field in str(raised.value)
        del broken[field]
    assert named[-1] == "grammar"
    await validator.validate(draft())


async def test_best_of_and_stream_rules(validator: Validator) -> None:
    def message(check: Any, **fields: Any) -> str:
        with pytest.raises(ValidationError) as raised:
            check(draft(**fields))
        return str(raised.value).removeprefix("Input validation error: ")

    assert message(validator.check_best_of, best_of=3) == "`best_of` must be > 0 and <= 2. Given: 3"
    validator.check_best_of(draft(best_of=0))
    validator.check_best_of(draft(best_of=2))
    assert message(validator.check_stream, best_of=2) == (
        "`best_of` != 1 is not supported when streaming tokens"
    )
    assert message(validator.check_stream, best_of=0) == (
        "`best_of` != 1 is not supported when streaming tokens"
    )
    assert message(validator.check_stream, prompt_logprobs=True) == (
        "`decoder_input_details` == true is not supported when streaming tokens"
    )
    one = Validator(
        validator._tokenizer,
        Limits(1, 4, 5, 1000, 3000, tiny_tokenizers.VOCAB_SIZE, False),
    )
    assert message(one.check_best_of, best_of=2) == "`best_of` != 1 is not allowed for this endpoint"


async def test_neutral_values_and_seed(validator: Validator) -> None:
    (request,) = await validator.validate(draft())
    sampling = request.sampling
    assert (sampling.do_sample, sampling.temperature, sampling.top_k, sampling.top_p) == (False, 1.0, 0, 1.0)
    assert (sampling.typical_p, sampling.repetition_penalty, sampling.frequency_penalty) == (1.0, 1.0, 0.0)
    assert sampling.seed == 7
    assert request.prompt_token_ids == (0, *tiny_tokenizers.ids("abc"))
    assert request.max_new_tokens == 3000 - 4  # all the room there is
    (request,) = await validator.validate(draft(seed=0))
    assert request.sampling.seed == 0


@pytest.mark.parametrize(
    ("fields", "samples"),
    [
        ({"do_sample": True}, True),
        ({"temperature": 1.0}, False),
        ({"temperature": 0.7}, True),
        ({"top_k": 5}, True),
        ({"top_p": 0.9}, True),
        ({"typical_p": 0.9}, True),
        ({"top_p": 0.9, "is_greedy": True}, False),
        ({"repetition_penalty": 1.3}, False),
    ],
)
async def test_what_switches_sampling_on(validator: Validator, fields: dict[str, Any], samples: bool) -> None:
    (request,) = await validator.validate(draft(**fields))
    assert request.sampling.do_sample is samples


async def test_best_of_gives_each_choice_its_own_draws(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizers.save(tmp_path), num_workers=1)
    requests = await Validator(tokenizer, LIMITS).validate(draft(best_of=2, temperature=1.0))
    assert [request.choice for request in requests] == [0, 1]
    assert requests[0].sampling.seed != requests[1].sampling.seed
    assert requests[0].request_id == requests[1].request_id
    tokenizer.close()


async def test_max_new_tokens_is_exact_and_fits(validator: Validator) -> None:
    (request,) = await validator.validate(draft(max_new_tokens=1500))
    assert request.max_new_tokens == 1500
    (request,) = await validator.validate(draft(inputs="x" * 900, max_new_tokens=9000))
    assert request.max_new_tokens == 3000 - 901  # accepted as TGI accepts it, and stops at the limit


async def test_truncate_keeps_the_end_and_bos(validator: Validator) -> None:
    (request,) = await validator.validate(draft(inputs="abcdef", truncate=3))
    assert request.prompt_token_ids == (0, *tiny_tokenizers.ids("ef"))
    assert request.prompt == "abcdef"


def test_truncated() -> None:
    def cut(truncate: int | None, num_leading: int = 1) -> tuple[int, ...]:
        return truncated(Encoded([0, 1, 2, 3], num_leading, []), truncate)

    assert cut(None) == (0, 1, 2, 3)
    assert cut(4) == (0, 1, 2, 3)
    assert cut(2) == (0, 3)
    assert cut(1) == (3,)
    assert cut(2, num_leading=0) == (2, 3)


async def test_a_token_that_the_model_lacks_is_the_client_s_error(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizers.save(tmp_path), num_workers=1)
    small = Validator(tokenizer, Limits(2, 4, 5, 1000, 3000, 5, False))
    with pytest.raises(ValidationError, match="not in the model's vocabulary of 5"):
        await small.validate(draft(inputs="z"))
    tokenizer.close()
