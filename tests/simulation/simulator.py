"""The real router without its outside, under seeded schedules of faults.

Step loop, scheduler, allocator, prefix cache, recovery and streaming run as they are; clock, transport and
shards are simulated. A simulated shard computes the next token from all tokens before it (scripted_shard) and
checks every KV slot that it reads. So whatever a client receives can be compared with what it must be, and
after every event the books of blocks and permits must balance. A seed names a schedule: a failing one replays
exactly.
"""

import asyncio
import functools
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import virtual_time

from scripted_shard import ScriptedShard, digest_of, extend_digest, next_token_after
from tgi_proto import generate_pb2 as pb
from tgi_router.answer import Answer, GeneratedToken
from tgi_router.errors import ClientGone, GenerationFailed, Overloaded, QueuedTooLong
from tgi_router.generation import Generation, Run
from tgi_router.mailbox import Mailbox
from tgi_router.metrics import Metrics
from tgi_router.request import Request, Sampling
from tgi_router.scheduling.plan import StepPlan, StepResult
from tgi_router.scheduling.step_loop import StepLoop
from tgi_router.shards.client import ModelFacts, ShardsLost, WarmupSizes, decode_result, encode_plan

VOCAB_SIZE = 200
EOS_TOKEN_ID = 7
MAX_TOTAL_TOKENS = 48
POISON = 150  # the token that kills the shards, where poison is among the faults
MAX_TOKENS_IN_MEMORY = 24  # in one step, where memory is short: chunks of 16 and seven decodes fit
MAX_LOSSES_BY_ONE = 4  # two to notice, two to prove
MIN_LOSSES_TO_BLAME = 3  # a sequence that was there so often may be blamed for kills from outside …
MIN_KILLS_ALONE_TO_BLAME = 2  # … if so many of them met it alone
LONGEST_SCHEDULE_S = 3600.0  # of simulated time: who is not served by then has starved


class Violation(AssertionError):
    """The router broke a promise."""


@dataclass(frozen=True, slots=True)
class Faults:
    """How likely things go wrong, each time they could."""

    crash: float = 0.0  # the shards die in a step
    stall: float = 0.0  # a step takes half a minute
    failed_restart: float = 0.0  # an attempt to reach the shards fails
    shrink: float = 0.0  # restarted shards have fewer blocks
    not_finite: float = 0.0  # a sequence of a step cannot be sampled
    abort: float = 0.0  # a client leaves at some moment
    oom: float = 0.0  # this share of steps that are larger than the memory allows runs out of it
    poison: float = 0.0  # a prompt holds a token that kills the shards when it is computed; so does an output

    @classmethod
    def draw(cls, rng: random.Random) -> "Faults":
        """Each kind is absent, rare or common."""
        levels = {
            "crash": (0.0, 0.01, 0.1),
            "stall": (0.0, 0.01, 0.05),
            "failed_restart": (0.0, 0.3, 0.8),
            "shrink": (0.0, 0.0, 0.3),
            "not_finite": (0.0, 0.0, 0.05),
            "abort": (0.0, 0.1, 0.5),
            "oom": (0.0, 0.0, 0.5, 1.0),
            "poison": (0.0, 0.0, 0.2),
        }
        return cls(**{name: rng.choice(choices) for name, choices in levels.items()})


class SimulatedGroup:
    """In the place of ShardGroup."""

    def __init__(self, rng: random.Random, faults: Faults, shard: ScriptedShard) -> None:
        self.rng = rng
        self.faults = faults
        self.shard = shard
        self.num_not_finite: Counter[int] = Counter()  # by sequence that was told to have failed
        self.check: Callable[[], None] = lambda: None  # after every event
        self.num_losses_near: Counter[int] = Counter()  # of any kind, by the sequences that were there
        self.num_kills_alone: Counter[int] = Counter()  # from outside, by the sequence that was alone there
        self.poisonous: set[int] = set()  # sequences that killed the shards
        self.num_poisonings = 0
        self.num_out_of_memory = 0

    async def connect(self, sizes: WarmupSizes) -> ModelFacts:
        await asyncio.sleep(self.rng.uniform(0.0, 2.0))
        if self.rng.random() < self.faults.failed_restart:
            raise ShardsLost("not there yet")
        if self.rng.random() < self.faults.shrink:
            # One longest sequence always fits: the launcher refuses to serve with less.
            floor = -(-MAX_TOTAL_TOKENS // self.shard.block_size)
            self.shard.num_blocks = max(floor, self.shard.num_blocks * 3 // 4)
        self.shard.forget()
        self.shard.kv.clear()
        self.shard.max_step_tokens, self.shard.max_sequences = sizes.max_step_tokens, sizes.max_sequences
        return ModelFacts(
            model_type="simulated",
            dtype="float32",
            device_type="cpu",
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=0,
            eos_token_ids=frozenset({EOS_TOKEN_ID}),
            world_size=1,
            num_blocks=self.shard.num_blocks,
            block_size=self.shard.block_size,
            max_total_tokens=MAX_TOTAL_TOKENS,
        )

    def poisonous_of(self, plan: pb.StepPlan) -> set[int]:
        """Sequences of a plan that has just run in which it computed the poison."""
        running = {sequence_id: self.shard.sequences[sequence_id] for sequence_id in plan.run_sequence_ids}
        return {
            sequence_id
            for sequence_id, sequence in running.items()
            if POISON in sequence.token_ids[: sequence.num_computed]
        }

    def open(self, wake: Callable[[], None]) -> "SimulatedStream":
        return SimulatedStream(self, wake)

    async def close(self) -> None:
        pass


class SimulatedStream:
    """In the place of GroupStream: plans arrive, run and answer in order, each with delays of its own."""

    def __init__(self, group: SimulatedGroup, wake: Callable[[], None]) -> None:
        self.results: deque[StepResult] = deque()
        self.lost: ShardsLost | None = None
        self._group = group
        self._wake = wake
        self._plans: asyncio.Queue[bytes] = asyncio.Queue()
        self._silent: set[int] = set()  # failed sequences that plans still run
        self._worker = asyncio.create_task(self._work())

    async def send(self, plan: StepPlan) -> None:
        self._group.check()
        if self.lost is not None:
            raise self.lost
        self._plans.put_nowait(encode_plan(plan))

    async def close(self) -> None:
        self._worker.cancel()

    async def _work(self) -> None:
        group, rng = self._group, self._group.rng
        while True:
            plan = pb.RunRequest.FromString(await self._plans.get()).plan
            await asyncio.sleep(30.0 if rng.random() < group.faults.stall else rng.uniform(0.001, 0.05))
            if rng.random() < group.faults.crash:
                self._lose("crashed", plan)
                return
            is_large = sum(plan.run_num_tokens) > MAX_TOKENS_IN_MEMORY
            if is_large and rng.random() < group.faults.oom:
                group.num_out_of_memory += 1
                self._lose("out of memory", plan)
                return
            result = group.shard.apply(plan)
            if group.faults.poison and (poisonous := group.poisonous_of(plan)):
                group.poisonous.update(poisonous)
                group.num_poisonings += 1
                self._lose("poisoned", plan)
                return
            self._silent.difference_update(plan.drop_sequence_ids)
            for row in reversed(range(len(result.sequence_ids))):
                if result.sequence_ids[row] in self._silent:
                    self._silence(result, row)
            if result.sequence_ids and rng.random() < group.faults.not_finite:
                self._fail(result, rng.randrange(len(result.sequence_ids)))
            self.results.append(decode_result(result.SerializeToString()))
            self._wake()
            if rng.random() < 0.3:
                await asyncio.sleep(0)  # the router may look now, or find two results at once

    def _lose(self, reason: str, plan: pb.StepPlan) -> None:
        """plan: the one under way; those that wait behind it are lost as well."""
        present = set(plan.run_sequence_ids)
        while not self._plans.empty():
            present.update(pb.RunRequest.FromString(self._plans.get_nowait()).plan.run_sequence_ids)
        self._group.num_losses_near.update(present)
        if reason == "crashed" and len(present) == 1:
            self._group.num_kills_alone.update(present)
        self.lost = ShardsLost(reason, is_out_of_memory=reason == "out of memory")
        self._wake()

    def _fail(self, result: pb.StepResult, row: int) -> None:
        """As a shard does: the sequence is told, and silent until it is dropped; its neighbours go on."""
        sequence_id = result.sequence_ids[row]
        self._silence(result, row)
        self._silent.add(sequence_id)
        self._group.num_not_finite[sequence_id] += 1
        result.failed.append(
            pb.FailedSequence(sequence_id=sequence_id, message="scores are not finite", not_finite=True)
        )

    def _silence(self, result: pb.StepResult, row: int) -> None:
        for column in (result.sequence_ids, result.token_ids, result.logprobs, result.num_top_tokens):
            del column[row]


class LetterTokenizer:
    """A token is a character."""

    special_ids = frozenset({EOS_TOKEN_ID})
    decode_byte_level = None

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(0x100 + token_id) for token_id in token_ids)


@dataclass(frozen=True, slots=True)
class Asked:
    """In the place of a Draft: what a client wants, already checked."""

    requests: list[Request]

    @property
    def num_sequences(self) -> int:
        return len(self.requests)

    num_choices = 1


@functools.cache
def _metrics() -> Metrics:
    """One for all schedules: to make them takes as long as a short schedule, and nothing reads them."""
    metrics = Metrics()
    metrics.open_lengths(MAX_TOTAL_TOKENS, MAX_TOTAL_TOKENS)
    return metrics


class NoValidator:
    def check_stream(self, asked: Asked) -> None:
        pass

    def check_best_of(self, asked: Asked) -> None:
        pass

    def check_choices(self, asked: Asked) -> None:
        pass

    async def validate(self, asked: Asked) -> list[Request]:
        await asyncio.sleep(0)
        return asked.requests


@dataclass
class Tally:
    """How the clients of a schedule fared."""

    answered: int = 0
    aborted: int = 0
    overloaded: int = 0
    queued_too_long: int = 0
    failed: int = 0
    poisoned: int = 0  # of the failed: guilty of losing the shards
    tokens: int = 0


@dataclass
class Simulation:
    seed: int
    tally: Tally = field(default_factory=Tally)

    def run(self) -> Tally:
        """One schedule. Raises Violation, or whatever else a broken router raises."""
        try:
            virtual_time.run(self._run())
        except virtual_time.Stuck:
            raise Violation("everybody waits for ever") from None
        return self.tally

    async def _run(self) -> None:
        rng = self.rng = random.Random(self.seed)
        faults = Faults.draw(rng)
        block_size = rng.choice((1, 2, 4, 8))
        num_blocks = -(-MAX_TOTAL_TOKENS // block_size) + rng.randrange(1 + 100 // block_size)
        shard = ScriptedShard(num_blocks=num_blocks, block_size=block_size, vocab_size=VOCAB_SIZE)
        self.group = SimulatedGroup(rng, faults, shard)
        self.group.check = self._check
        metrics = _metrics()
        clock = asyncio.get_running_loop().time
        self.step_loop = StepLoop(
            self.group,  # type: ignore[arg-type]
            metrics,
            max_batch_prefill_tokens=rng.randrange(1, 64),
            max_total_tokens=MAX_TOTAL_TOKENS,
            max_sequences=rng.randrange(1, 8),
            share_prefixes=rng.random() < 0.8,
            clock=clock,
        )
        self.max_permits = rng.randrange(2, 10)
        self.max_queue_time_s = rng.choice((None, None, 0.05, 0.5, 20.0))
        self.generation = Generation(
            self.step_loop,
            NoValidator(),  # type: ignore[arg-type]
            LetterTokenizer(),  # type: ignore[arg-type]
            metrics,
            eos_token_ids={EOS_TOKEN_ID},
            max_concurrent_requests=self.max_permits,
            max_queue_time_s=self.max_queue_time_s,
            clock_ns=lambda: int(clock() * 1e9),
        )
        async with asyncio.timeout(LONGEST_SCHEDULE_S):
            await self.step_loop.start()
            await asyncio.gather(*(self._client(number) for number in range(rng.randrange(1, 10))))
            await self.step_loop.drain()
        self._check()
        await self._check_nothing_is_left()
        await self.step_loop.close()

    async def _client(self, number: int) -> None:
        rng = self.rng
        await asyncio.sleep(rng.choice((0.0, rng.uniform(0.0, 3.0))))
        prompt = tuple(rng.randrange(3) for _ in range(rng.randrange(1, 30)))
        if rng.random() < self.group.faults.poison:
            place = rng.randrange(len(prompt))
            prompt = (*prompt[:place], POISON, *prompt[place + 1 :])
        max_new_tokens = rng.randrange(1, MAX_TOTAL_TOKENS - len(prompt) + 1)
        asked = Asked(
            [
                Request(f"{number}", "", prompt, Sampling(), max_new_tokens, choice=choice)
                for choice in range(rng.choice((1, 1, 2)))
            ]
        )
        mailbox = Mailbox()
        try:
            run = await self.generation.begin(
                asked,  # type: ignore[arg-type]
                mailbox,
                streams=True,
                started_ns=0,
                route="/",
            )
        except Overloaded:
            self.tally.overloaded += 1
            return
        leaving = (
            asyncio.create_task(self._leave(mailbox)) if rng.random() < self.group.faults.abort else None
        )
        try:
            await self._read(run, mailbox)
        finally:
            run.close()
            if leaving is not None:
                leaving.cancel()

    async def _leave(self, mailbox: Mailbox) -> None:
        await asyncio.sleep(self.rng.expovariate(2.0))
        mailbox.close()

    async def _read(self, run: Run, mailbox: Mailbox) -> None:
        """Until every answer is over, comparing each token with what it must be."""
        digests = {answer: digest_of(answer.request.prompt_token_ids) for answer in run.answers}
        num_tokens = dict.fromkeys(run.answers, 0)
        open_answers = set(run.answers)
        while open_answers:
            if mailbox.is_closed:
                self.tally.aborted += 1
                return
            for answer, token in await self._take(mailbox):
                if answer not in open_answers:
                    raise Violation("news of an answer that is over")
                if token is None and isinstance(answer.error, QueuedTooLong):
                    self._check_queued_too_long(run)
                    self.tally.queued_too_long += 1
                    open_answers.discard(answer)
                    continue
                if token is None:
                    self._check_failure(run, answer)
                    open_answers.discard(answer)
                    continue
                if token.id != next_token_after(digests[answer], VOCAB_SIZE):
                    raise Violation(f"token {token.index} is wrong, doubled or lost")
                digests[answer] = extend_digest(digests[answer], token.id)
                num_tokens[answer] += 1
                self.tally.tokens += 1
                if answer.ends_with(token):
                    if token.id != EOS_TOKEN_ID and num_tokens[answer] != answer.request.max_new_tokens:
                        raise Violation("an answer ended too early")
                    self.tally.answered += 1
                    open_answers.discard(answer)
        if self.max_queue_time_s is not None and self._shortest_wait_s(run) > self.max_queue_time_s + 1e-3:
            raise Violation("a request waited for longer than it may")

    def _check_queued_too_long(self, run: Run) -> None:
        if run.has_left_queue:
            raise Violation("a request that was scheduled ended for waiting too long")
        if self.max_queue_time_s is None or self._shortest_wait_s(run) < self.max_queue_time_s:
            raise Violation("a request ended for waiting too long, and had not")

    def _shortest_wait_s(self, run: Run) -> float:
        """Of the answers of a run that is over, until their first step or their end."""
        return min(run.timings(answer).queue for answer in run.answers) / 1e9 + 1e-6

    def _check_failure(self, run: Run, answer: Answer) -> None:
        """Only who is guilty fails, or looked guilty: kills from outside met it again and again."""
        sequence_id = run._sequence_ids[answer]
        group = self.group
        is_guilty = sequence_id in group.poisonous
        is_unlucky = (
            group.num_losses_near[sequence_id] >= MIN_LOSSES_TO_BLAME
            and group.num_kills_alone[sequence_id] >= MIN_KILLS_ALONE_TO_BLAME
        )
        if not isinstance(answer.error, GenerationFailed) or not (
            group.num_not_finite[sequence_id] > 1 or is_guilty or is_unlucky
        ):
            raise Violation(f"an answer ended with {answer.error!r}")
        self.tally.failed += 1
        self.tally.poisoned += is_guilty

    async def _take(self, mailbox: Mailbox) -> list[tuple[Answer, GeneratedToken | None]]:
        try:
            return list(await mailbox.take())
        except ClientGone:
            return []

    def _check(self) -> None:
        scheduler = self.step_loop._scheduler
        scheduler.allocator.check([sequence.block_ids for sequence in scheduler.running.values()])
        if len(scheduler.running) > scheduler.limits.max_sequences:
            raise Violation("more sequences run than may")
        waiting = {sequence.sequence_id for sequence in scheduler.waiting}
        if waiting | set(scheduler.running) != set(self.step_loop._sequences):
            raise Violation("a living sequence neither runs nor waits")
        num_free = self.generation.permits._num_free
        if not 0 <= num_free <= self.max_permits:
            raise Violation(f"{num_free} of {self.max_permits} permits are free")

    async def _check_nothing_is_left(self) -> None:
        await asyncio.sleep(60.0)  # the last plan drops what ended
        if self.group.num_poisonings > MAX_LOSSES_BY_ONE * len(self.group.poisonous):
            raise Violation("a poisonous sequence was tried too often")
        if self.step_loop._sequences:
            raise Violation("a sequence outlived its client")
        if self.step_loop._scheduler.allocator.num_held:
            raise Violation("a block is held by nobody")
        if self.generation.permits._num_free != self.max_permits:
            raise Violation("a permit is lost")
