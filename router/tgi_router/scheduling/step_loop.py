"""State -> plan -> result -> state, two plans ahead of the results.

While the shards compute plan n, plan n+1 already waits at their door, so the device never waits for us. One
task drives everything; listeners are called from it, in order. When the shards are lost it waits until they
are back, puts every living sequence into the queue again and goes on: listeners notice a pause and nothing
else.

A plan whose sequences have a grammar is sent like any other, before their last tokens are known; its masks
follow when they are, that is at the latest when it is the oldest in flight. Meanwhile the shards run its
forward pass; sequences without a grammar that share the step share the wait.
"""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import structlog
from msgspec import structs

from tgi_router.grammar.mask import GrammarBroken, MaskWorker
from tgi_router.metrics import Metrics
from tgi_router.request import Listener, Request
from tgi_router.scheduling import recovery
from tgi_router.scheduling.block_allocator import BlockAllocator
from tgi_router.scheduling.plan import Masks, StepPlan, StepResult
from tgi_router.scheduling.scheduler import Limits, Scheduler
from tgi_router.scheduling.sequence import Sequence
from tgi_router.shards.client import ModelFacts, ShardsLost, WarmupSizes
from tgi_router.shards.group import GroupStream, ShardGroup

MAX_PLANS_IN_FLIGHT = 2
MIN_PROMPT_TOKENS = 64  # of every plan, beside a full house of decodes: prompts always make progress
STALL_FACTOR = 10  # a step that takes so many times the longest one so far hangs

State = Literal["ok", "busy", "recovering", "stalled", "dead"]

log = structlog.get_logger(__name__)


class SequenceFailed(Exception):
    """One sequence cannot go on; the text is for its client."""


class ShardsGone(Exception):
    """The shards are away and nobody will wait for them any longer."""


@dataclass(eq=False, slots=True)
class InFlight:
    plan: StepPlan
    sent_at: float
    needs_masks: bool  # and they have not been sent
    masked: list[Sequence] | None = None  # whose masks are being computed; None: not begun
    masks: "asyncio.Future[list[bytes | GrammarBroken]] | None" = None  # one for each of `masked`


class StepLoop:
    def __init__(
        self,
        group: ShardGroup,
        metrics: Metrics,
        *,
        max_batch_prefill_tokens: int,
        max_total_tokens: int | None,
        max_sequences: int,
        max_kv_tokens: int | None = None,  # a cap on what the shards offer
        share_prefixes: bool = True,
        stall_timeout_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._group = group
        self._metrics = metrics
        self._limits = limits_of_steps(max_batch_prefill_tokens, max_sequences)
        self._sizes = WarmupSizes(self._limits.max_step_tokens, max_total_tokens or 0, max_sequences)
        self._max_kv_tokens = max_kv_tokens
        self._share_prefixes = share_prefixes
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock
        self._facts: ModelFacts | None = None
        self._scheduler = Scheduler(self._limits, BlockAllocator(0, 1))
        self._sequences: dict[int, Sequence] = {}  # the living, by sequence id
        self._sequence_ids = itertools.count(1)
        self._in_flight: deque[InFlight] = deque()
        self._longest_step_s = 0.0
        self._last_result_at = 0.0
        self._mask_worker = MaskWorker()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None
        self._are_shards_back = False
        self._is_draining = False

    @property
    def model(self) -> ModelFacts:
        assert self._facts is not None, "start() has not returned"
        return self._facts

    @property
    def is_healthy(self) -> bool:
        return self.state in ("ok", "busy")

    @property
    def state(self) -> State:
        """Reads and nothing else: /health asks at any load.

        busy: requests wait in the queue. recovering: the shards are away. stalled: the step under way takes
        longer than any should; the launcher, which sees the same, restarts the shards. dead: the loop broke.
        """
        if self._task is not None and self._task.done():
            return "dead"
        if not self._are_shards_back:
            return "recovering"
        if self._in_flight:
            began_at = max(self._in_flight[0].sent_at, self._last_result_at)
            limit_s = max(self._stall_timeout_s, STALL_FACTOR * self._longest_step_s)
            if self._clock() - began_at > limit_s:
                return "stalled"
        return "busy" if len(self._scheduler.waiting) else "ok"

    async def start(self) -> None:
        """Reach the shards, warm them up, and begin. Waits as long as it takes. Raises WarmupRefused."""
        self._accept(await recovery.connect(self._group, self._sizes, self._clock, is_start=True))
        self._task = asyncio.create_task(self._serve())

    async def join(self) -> None:
        """Returns once close() was called. Raises if the loop broke: a bug of ours, the process must end."""
        assert self._task is not None, "start() has not returned"
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.result()

    def submit(self, request: Request, listener: Listener) -> int:
        start = self.model.decoder_start_token_ids
        sequence = Sequence.of(next(self._sequence_ids), request, listener, start)
        self._sequences[sequence.sequence_id] = sequence
        self._scheduler.add(sequence)
        self._idle.clear()
        self._wake.set()
        self._metrics.tgi_queue_size.set(len(self._scheduler.waiting))
        return sequence.sequence_id

    def cancel(self, sequence_id: int) -> None:
        """Its client is gone: no listener call follows. Does nothing if the sequence is over."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self._end(sequence)
            self._wake.set()

    def fail_all(self, error: Exception) -> None:
        for sequence in list(self._sequences.values()):
            self._end(sequence)
            sequence.listener.on_error(error)

    async def drain(self) -> None:
        """Wait until every sequence is over. Without shards that would be for ever: then all fail at once."""
        self._is_draining = True
        if not self._are_shards_back:
            self.fail_all(ShardsGone("the model shards are not available"))
        await self._idle.wait()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._mask_worker.close()
        await self._group.close()

    # The loop

    async def _serve(self) -> None:
        try:
            await self._serve_for_ever()
        except Exception as error:
            self._are_shards_back = False
            log.exception("The step loop broke")
            self.fail_all(error)
            raise

    async def _serve_for_ever(self) -> None:
        while True:
            stream = self._group.open(self._wake.set)
            try:
                await self._run_steps(stream)
            except ShardsLost as error:
                log.error("Lost the shards", reason=str(error), sequences=len(self._sequences))
                for step in self._in_flight:
                    self._metrics.tgi_batch_inference_failure.labels(method_of(step.plan)).inc()
                budget = self._scheduler.prompt_budget
                if error.is_out_of_memory and budget.halve():
                    log.warning("Out of memory: shorter prompt chunks from now on", tokens=budget.num_tokens)
                else:
                    self._blame_somebody(error)
            finally:
                await stream.close()
            self._are_shards_back = False
            if self._is_draining:  # the launcher restarts nothing any more
                self.fail_all(ShardsGone("the model shards are not available"))
            lost_at = self._clock()
            self._accept(await recovery.connect(self._group, self._sizes, self._clock, is_start=False))
            self._metrics.tgi_recoveries.inc()
            log.info(
                "The shards are back",
                seconds=round(self._clock() - lost_at, 3),
                resumed_sequences=len(self._scheduler.waiting),
            )

    def _blame_somebody(self, error: ShardsLost) -> None:
        """Fail the sequence that alone loses the shards, if there is one; else remember who was there."""
        blame = self._scheduler.blame
        guilty = blame.lost(
            (row.sequence for step in self._in_flight for row in step.plan.rows),
            is_alive=lambda sequence: sequence.sequence_id in self._sequences,
        )
        if guilty is not None:
            log.error("A sequence loses the shards", request_id=guilty.request.request_id)
            self._fail(guilty, f"the model shards fail whenever they compute this sequence: {error}")
        elif blame.prime_suspect is not None:
            log.warning("The shards were lost again: suspects run alone", suspects=len(blame.quarantined))

    def _accept(self, facts: ModelFacts) -> None:
        """Shards with nothing on them: every living sequence starts over from its tokens."""
        if self._facts is None:
            self._facts = facts
        num_blocks = facts.usable_blocks(self._max_kv_tokens)
        share_prefixes = self._share_prefixes and not (facts.blocks_are_states or facts.has_encoder)
        allocator = BlockAllocator(num_blocks, facts.block_size, share_prefixes=share_prefixes)
        self._longest_step_s = max(self._longest_step_s, facts.longest_step_s)
        self._in_flight.clear()
        self._scheduler.restart(allocator)
        self._metrics.tgi_kv_blocks_total.set(num_blocks)
        self._are_shards_back = True

    async def _run_steps(self, stream: GroupStream) -> None:
        """Until the shards are lost: raises ShardsLost."""
        while True:
            self._wake.clear()
            while stream.results:
                self._take(stream.results.popleft())
            if stream.lost is not None:
                raise stream.lost
            while len(self._in_flight) < MAX_PLANS_IN_FLIGHT and (plan := self._plan()) is not None:
                # In flight before it is sent: a shard that hangs may not even read.
                self._in_flight.append(InFlight(plan, self._clock(), plan.awaits_masks))
                await stream.send(plan)
            self._begin_masks()
            for step in self._in_flight:
                if step.needs_masks and step.masks is not None and step.masks.done():
                    await stream.send_masks(self._finish_masks(step))
            if not self._wake.is_set():
                self._observe()
                await self._wake.wait()

    def _plan(self) -> StepPlan | None:
        scheduler, metrics = self._scheduler, self._metrics
        num_preemptions, num_hit_tokens = scheduler.num_preemptions, scheduler.num_hit_tokens
        began_at = self._clock()
        plan = scheduler.plan()
        planned_at = self._clock()
        metrics.tgi_preemptions.inc(scheduler.num_preemptions - num_preemptions)
        metrics.tgi_prefix_cache_hit_tokens.inc(scheduler.num_hit_tokens - num_hit_tokens)
        while plan is None and not self._in_flight and (sequence := scheduler.next_to_admit) is not None:
            # Nothing runs and still there is no room: this one needs more blocks than there are.
            allocator = scheduler.allocator
            self._fail(
                sequence,
                f"{len(sequence.token_ids)} tokens do not fit into the KV cache of "
                f"{allocator.num_blocks} blocks of {allocator.block_size} tokens",
            )
            plan = scheduler.plan()
        if plan is None:
            return None
        for row in plan.rows:
            if not row.sequence.was_scheduled:
                row.sequence.was_scheduled = True
                row.sequence.listener.on_scheduled()
        if plan.rows:
            metrics.tgi_batch_inference_count.labels(method_of(plan)).inc()
        if plan.add:
            metrics.tgi_batch_next_size.observe(len(plan.add))
            if len(plan.add) < len(plan.rows):
                metrics.tgi_batch_concat.labels("chunking").inc()
                metrics.tgi_batch_concat_duration.labels("decode").observe(planned_at - began_at)
        return plan

    def _begin_masks(self) -> None:
        """Of the steps in flight whose sequences' last tokens are all known."""
        if not any(step.needs_masks for step in self._in_flight):
            return
        awaiting: set[Sequence] = set()  # the result of an earlier step will move their grammars on
        for step in self._in_flight:
            sampling = [row.sequence for row in step.plan.rows if row.samples]
            if step.needs_masks and step.masks is None and awaiting.isdisjoint(sampling):
                step.masked = [
                    sequence
                    for sequence in sampling
                    if sequence.matcher is not None and sequence.sequence_id in self._sequences
                ]
                matchers = [sequence.matcher for sequence in step.masked if sequence.matcher is not None]
                step.masks = self._mask_worker.begin(matchers, self._wake.set)
            awaiting.update(sampling)

    def _finish_masks(self, step: InFlight) -> Masks:
        """Those of the sequences that are alive still. The others' tokens are ignored, whatever they are."""
        assert step.masks is not None
        assert step.masked is not None
        bits: dict[int, bytes] = {}
        for sequence, mask in zip(step.masked, step.masks.result(), strict=True):
            if sequence.sequence_id not in self._sequences:
                continue
            if isinstance(mask, GrammarBroken):
                self._fail(sequence, str(mask))
            else:
                bits[sequence.sequence_id] = mask
        step.needs_masks = False
        return Masks(step.plan.step_id, bits)

    def _take(self, result: StepResult) -> None:
        if not self._in_flight or self._in_flight[0].plan.step_id != result.step_id:
            raise ShardsLost(f"the shards answered step {result.step_id}, which is not the oldest in flight")
        step = self._in_flight.popleft()
        if step.needs_masks:
            raise ShardsLost(f"the shards answered step {result.step_id} before they had its masks")
        plan, sent_at = step.plan, step.sent_at
        taken_at = self._last_result_at = self._clock()
        self._longest_step_s = max(self._longest_step_s, result.total_s)
        for sequence_id, failure in result.failed.items():
            sequence = self._sequences.get(sequence_id)
            if sequence is None:
                continue
            if not (failure.not_finite and self._scheduler.recompute(sequence)):
                self._fail(sequence, failure.message)
        for piece in result.prompt_logprobs:
            if piece.sequence_id in result.failed:
                continue  # they are no better than the scores; those of the second try will be told
            if (sequence := self._sequences.get(piece.sequence_id)) is not None:
                known = max(sequence.num_prompt_logprobs - piece.start_position, 0)  # told before a restart
                if known < len(piece.logprobs):
                    sequence.listener.on_prompt_logprobs(piece.start_position + known, piece.logprobs[known:])
                    sequence.num_prompt_logprobs = piece.start_position + len(piece.logprobs)
        for sequence, token in self._scheduler.confirm(plan, result):
            # A listener may cancel its sequence, or another, in the middle of this.
            if sequence.sequence_id not in self._sequences:
                continue
            if sequence.matcher is not None:
                try:
                    if sequence.matcher.advance(token.token_id):
                        token = structs.replace(token, ends_grammar=True)
                except GrammarBroken as error:
                    self._fail(sequence, str(error))
                    continue
            if sequence.listener.on_token(token) is not None:
                self._end(sequence)
        if plan.rows:
            method = method_of(plan)
            self._metrics.tgi_batch_inference_success.labels(method).inc()
            self._metrics.tgi_batch_inference_duration.labels(method).observe(taken_at - sent_at)
            self._metrics.tgi_batch_forward_duration.labels(method).observe(result.forward_s)
            self._metrics.tgi_batch_decode_duration.labels(method).observe(result.sample_s)
            self._metrics.tgi_batch_filter_duration.labels(method).observe(self._clock() - taken_at)

    def _fail(self, sequence: Sequence, message: str) -> None:
        self._end(sequence)
        sequence.listener.on_error(SequenceFailed(message))

    def _end(self, sequence: Sequence) -> None:
        """Does nothing if the sequence is over already."""
        self._scheduler.remove(sequence)
        self._sequences.pop(sequence.sequence_id, None)
        if not self._sequences:
            self._idle.set()

    def _observe(self) -> None:
        scheduler, metrics = self._scheduler, self._metrics
        metrics.tgi_queue_size.set(len(scheduler.waiting))
        metrics.tgi_batch_current_size.set(len(scheduler.running))
        metrics.tgi_batch_current_max_tokens.set(
            sum([sequence.max_tokens for sequence in scheduler.running.values()])
        )
        metrics.tgi_kv_blocks_used.set(scheduler.allocator.num_held)
        metrics.tgi_prefix_cache_blocks.set(scheduler.allocator.prefix_cache.num_idle)


def limits_of_steps(max_batch_prefill_tokens: int, max_sequences: int) -> Limits:
    return Limits(
        max_step_tokens=max(max_batch_prefill_tokens, max_sequences + MIN_PROMPT_TOKENS),
        max_sequences=max_sequences,
    )


def method_of(plan: StepPlan) -> str:
    """TGI's two words for a step: one that processes any prompt token is a prefill."""
    return "prefill" if any(row.num_tokens > 1 for row in plan.rows) else "decode"
