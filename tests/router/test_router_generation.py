"""Answers and runs, with a player in the step loop's place: token by token, failures, clients that go."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import tiny_tokenizers
from tgi_router.answer import GeneratedToken
from tgi_router.errors import (
    ClientGone,
    GenerationFailed,
    Overloaded,
    QueuedTooLong,
    ShardsUnavailable,
    ShuttingDown,
)
from tgi_router.generation import Generation, Run, duration_text
from tgi_router.mailbox import Mailbox
from tgi_router.metrics import Metrics
from tgi_router.request import FinishReason, Listener, Request, SampledToken
from tgi_router.scheduling.step_loop import SequenceFailed, ShardsGone
from tgi_router.text.tokenizer import Tokenizer
from tgi_router.validation import Draft, Limits, Validator

EOS = tiny_tokenizers.EOS_ID
END = 2  # special, but no end of sequence


@dataclass
class Player:
    """Takes sequences like the step loop; a test plays their tokens."""

    listeners: dict[int, Listener] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)

    def submit(self, request: Request, listener: Listener) -> int:
        self.requests.append(request)
        self.listeners[len(self.requests)] = listener
        return len(self.requests)

    def cancel(self, sequence_id: int) -> None:
        self.cancelled.append(sequence_id)
        del self.listeners[sequence_id]

    async def drain(self) -> None:
        assert not self.listeners

    def play(
        self, token_ids: Sequence[int], sequence_id: int = 1, logprob: float = -0.5
    ) -> FinishReason | None:
        listener = self.listeners[sequence_id]
        listener.on_scheduled()
        for token_id in token_ids:
            if (reason := listener.on_token(SampledToken(token_id, logprob))) is not None:
                del self.listeners[sequence_id]
                return reason
        return None


@dataclass
class Stage:
    generation: Generation
    player: Player
    metrics: Metrics

    async def begin(self, mailbox: Mailbox | None = None, *, streams: bool = True, **fields: Any) -> Run:
        given: dict[str, Any] = {"inputs": "abc", "add_special_tokens": True, "max_new_tokens": 50} | fields
        draft = Draft(**given)
        return await self.generation.begin(
            draft, mailbox or Mailbox(), streams=streams, started_ns=0, route="/generate"
        )

    def count(self, name: str) -> float:
        line = next(line for line in self.metrics.render().decode().splitlines() if line.startswith(name))
        return float(line.rpartition(" ")[2])


@pytest.fixture
def max_queue_time_s() -> float | None:
    return None


@pytest.fixture
async def stage(tmp_path: Path, max_queue_time_s: float | None) -> AsyncIterator[Stage]:
    tokenizer = Tokenizer.load(tiny_tokenizers.save(tmp_path), num_workers=1)
    limits = Limits(3, 4, 5, 100, 200, tiny_tokenizers.VOCAB_SIZE, prompt_logprobs=True)
    player, metrics = Player(), Metrics()
    metrics.open_lengths(100, 200)
    clock = iter(range(0, 10**9, 1000))
    generation = Generation(
        player,
        Validator(tokenizer, limits),
        tokenizer,
        metrics,
        eos_token_ids=frozenset({EOS}),
        max_concurrent_requests=4,
        max_queue_time_s=max_queue_time_s,
        clock_ns=lambda: next(clock),
    )
    yield Stage(generation, player, metrics)
    tokenizer.close()


def ids(text: str) -> list[int]:
    return tiny_tokenizers.ids(text)


async def tokens(mailbox: Mailbox) -> list[GeneratedToken]:
    return [token for _, token in await mailbox.take() if token is not None]


async def test_length_wins_over_end_of_sequence(stage: Stage) -> None:
    run = await stage.begin(max_new_tokens=3)
    assert stage.player.play([*ids("xy"), EOS]) == "length"
    assert run.answers[0].generated_text() == "xy"


async def test_end_of_sequence_counts_but_is_no_text(stage: Stage) -> None:
    mailbox = Mailbox()
    run = await stage.begin(mailbox)
    assert stage.player.play([*ids("xy"), END, *ids("z"), EOS]) == "eos_token"
    seen = await tokens(mailbox)
    assert [token.text for token in seen] == ["x", "y", "<|end|>", "z", "</s>"]
    assert [token.special for token in seen] == [False, False, True, False, True]
    assert [token.index for token in seen] == [1, 2, 3, 4, 5]
    answer = run.answers[0]
    assert answer.generated_text() == "xyz"
    assert answer.ends_with(seen[-1])
    assert not answer.ends_with(seen[-2])
    assert len(answer.token_ids) == 5


async def test_native_stop_strings_stay_and_end_with_a_token(stage: Stage) -> None:
    run = await stage.begin(stop=("th", "o."))
    assert stage.player.play([*ids("so."), *ids("x")]) == "stop_sequence"
    assert run.answers[0].generated_text() == "so."


async def test_openai_stop_strings_are_cut_off_and_held_back(stage: Stage) -> None:
    mailbox = Mailbox()
    await stage.begin(mailbox, stop=("END",), trim_stop=True)
    assert stage.player.play(ids("a EN ENDxx")) == "stop_sequence"
    assert [token.shown for token in await tokens(mailbox)] == ["a", " ", "", "", "EN ", "", "", ""]


@pytest.mark.parametrize(("last", "reason"), [(EOS, "eos_token"), (ids("q")[0], "length")])
async def test_what_was_held_back_comes_with_the_end(stage: Stage, last: int, reason: str) -> None:
    run = await stage.begin(stop=("END",), trim_stop=True, streams=False, max_new_tokens=4)
    assert (
        stage.player.play([*ids("aE"), last] if reason == "eos_token" else [*ids("aqE"), ids("N")[0]])
        == reason
    )
    assert run.answers[0].generated_text() == ("aE" if reason == "eos_token" else "aqEN")


async def test_special_tokens_are_not_shown_but_can_be_stop_strings(stage: Stage) -> None:
    mailbox = Mailbox()
    await stage.begin(mailbox, stop=("<|end|>",), trim_stop=True)
    assert stage.player.play([*ids("ab"), 0, *ids("c"), END, *ids("d")]) == "stop_sequence"
    assert [token.shown for token in await tokens(mailbox)] == ["a", "b", "", "c", ""]


async def test_news_pile_up_and_wake_the_reader_once(stage: Stage) -> None:
    mailbox = Mailbox()
    await stage.begin(mailbox)
    reading = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    stage.player.play(ids("abc"))
    assert len(await reading) == 3
    mailbox.wake()
    reading = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    mailbox.wake()
    assert await reading == []


async def test_permits_are_taken_for_every_choice_and_given_back(stage: Stage) -> None:
    runs = [await stage.begin(best_of=3, do_sample=True, streams=False)]
    with pytest.raises(Overloaded):
        await stage.begin(best_of=2, inputs="", streams=False)  # overload comes before the rules
    runs.append(await stage.begin())
    with pytest.raises(Overloaded):
        await stage.begin()
    for run in runs:
        run.close()
        run.close()
    with pytest.raises(Exception, match="cannot be empty"):
        await stage.begin(inputs="")
    for _ in range(4):
        await stage.begin()


async def test_the_best_choice_has_the_highest_mean_logprob(stage: Stage) -> None:
    mailbox = Mailbox()
    run = await stage.begin(mailbox, best_of=3, do_sample=True, streams=False, max_new_tokens=2)
    for sequence_id, logprob in ((2, -0.25), (1, -0.5), (3, -0.25)):
        stage.player.play(ids("xy"), sequence_id, logprob)
    await stage.generation.finish([run], mailbox)
    assert run.best is run.answers[1]  # the earliest of equals
    run.close()
    assert stage.count("tgi_request_success") == 1
    assert stage.count("tgi_request_generated_tokens_sum") == 2


async def test_a_failed_sequence_fails_its_request_alone(stage: Stage) -> None:
    mailbox = Mailbox()
    run = await stage.begin(mailbox, best_of=2, do_sample=True, streams=False)
    other = await stage.begin()
    stage.player.listeners.pop(2).on_error(SequenceFailed("it broke"))
    with pytest.raises(
        GenerationFailed, match="Request failed during generation: Server error: it broke"
    ) as raised:
        await stage.generation.finish([run], mailbox)
    assert (raised.value.status, raised.value.error_type) == (424, "generation")
    run.close()
    assert stage.player.cancelled == [1]
    assert list(stage.player.listeners) == [3]
    assert not other.is_over


async def test_shards_that_are_gone_for_good_are_a_503(stage: Stage) -> None:
    mailbox = Mailbox()
    run = await stage.begin(mailbox, streams=False)
    stage.player.listeners.pop(1).on_error(ShardsGone("the model shards are not available"))
    with pytest.raises(ShardsUnavailable) as raised:
        await stage.generation.finish([run], mailbox)
    assert (raised.value.status, raised.value.error_type) == (503, "generation")
    assert str(raised.value).startswith("Request failed during generation: Server error: ")


async def test_a_client_that_goes_takes_its_sequences_along(stage: Stage) -> None:
    mailbox = Mailbox()
    run = await stage.begin(mailbox)
    stage.player.play(ids("a"))
    mailbox.close()
    with pytest.raises(ClientGone):
        await mailbox.take()
    run.close()
    assert stage.player.cancelled == [1]
    assert stage.count('tgi_request_failure{err="dropped"}') == 1
    assert stage.count("tgi_request_success") == 0


async def test_timings_add_up(stage: Stage) -> None:
    run = await stage.begin(streams=False, max_new_tokens=2)
    stage.player.play(ids("ab"))
    timings = run.timings(run.answers[0])
    assert timings.total == timings.validation + timings.queue + timings.inference
    assert timings.per_token(2) == timings.inference // 2


@pytest.mark.parametrize("max_queue_time_s", [0.05])
async def test_who_waits_too_long_in_the_queue_is_refused(stage: Stage) -> None:
    mailbox = Mailbox()
    run = await stage.begin(mailbox, best_of=2, do_sample=True, streams=False)
    with pytest.raises(QueuedTooLong, match=r"longer than `max_queue_time`, 0\.05 seconds") as raised:
        await stage.generation.finish([run], mailbox)
    assert (raised.value.status, raised.value.error_type) == (429, "overloaded")
    assert raised.value.retry_after_s == 1
    assert stage.player.cancelled == [1, 2]
    run.close()
    assert stage.generation.permits._num_free == 4


@pytest.mark.parametrize("max_queue_time_s", [0.05])
async def test_a_request_of_which_a_sequence_ran_waits_as_long_as_it_takes(stage: Stage) -> None:
    mailbox = Mailbox()
    run = await stage.begin(mailbox, best_of=2, do_sample=True, streams=False, max_new_tokens=1)
    stage.player.listeners[2].on_scheduled()
    other = await stage.begin()  # a clock for the test: it ends later than the first one would
    while not other.is_over:  # noqa: ASYNC110  # polled
        await asyncio.sleep(0.01)
    assert not run.is_over
    stage.player.play(ids("x"), 1)
    stage.player.play(ids("x"), 2)
    await stage.generation.finish([run], mailbox)


async def test_draining_refuses_what_is_new(stage: Stage) -> None:
    stage.generation.check_open()
    await stage.generation.drain()
    with pytest.raises(ShuttingDown):
        stage.generation.check_open()


def test_durations_for_people() -> None:
    assert [duration_text(ns) for ns in (12, 3_500, 52_870_000, 1_200_000_000)] == [
        "12ns",
        "3.5µs",
        "52.87ms",
        "1.2s",
    ]
