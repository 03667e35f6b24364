"""Who runs next: a pure function of state. No I/O and no clock; sequences, budgets and blocks in, a plan out.

The order of a plan:
1. Drop what ended, was cancelled or was preempted since the last plan. Plans run strictly in order, so the
   blocks of a dropped sequence may be granted again in the same plan.
2. Sequences with one pending token (decodes) run, oldest first. Each may need a block; when none is left,
   the youngest running sequence is preempted: it leaves the shards and waits at the front of the queue. Its
   tokens stay with us, and most of its blocks with the prefix cache.
3. What is left of the token budget goes to prompts under way, oldest first, chunk by chunk.
4. Then waiting sequences are admitted, first come first served, while budget, blocks and places last. One
   whose prompt a running sequence is computing right now (choices of one request, a shared beginning) waits
   for those blocks instead of computing them again; who stands behind it may pass. In a quarantine (see
   blame) only the prime suspect is admitted, once nothing else runs.

A plan may be made while earlier ones are still in flight: a sequence whose next token is not known yet is
planned as if it went on. What a result then ends has been computed once too often, and that surplus token
is ignored.
"""

from dataclasses import dataclass

from tgi_router.request import SampledToken
from tgi_router.scheduling.blame import Blame
from tgi_router.scheduling.block_allocator import BlockAllocator, ceil_div
from tgi_router.scheduling.plan import AddedSequence, Row, StepPlan, StepResult
from tgi_router.scheduling.prefix_cache import block_key
from tgi_router.scheduling.prompt_budget import PromptBudget
from tgi_router.scheduling.queue import WaitingQueue
from tgi_router.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Limits:
    max_step_tokens: int  # tokens in one plan; decodes are never held back by it
    max_sequences: int  # running at a time
    # Fewer tokens than these are computed twice rather than waited for: the delay would cost more.
    min_tokens_to_wait_for: int = 64

    @property
    def max_first_tokens(self) -> int:
        """Prompt tokens for which there is room in one step, however many decodes it has."""
        return self.max_step_tokens - self.max_sequences


class Scheduler:
    def __init__(self, limits: Limits, allocator: BlockAllocator) -> None:
        assert limits.max_step_tokens > limits.max_sequences  # else decodes alone could starve every prompt
        self.limits = limits
        self.allocator = allocator
        self.waiting = WaitingQueue()
        self.running: dict[int, Sequence] = {}  # by sequence id, oldest first
        self.blame = Blame()
        self.prompt_budget = PromptBudget(limits.max_step_tokens)
        self.num_preemptions = 0
        self.num_hit_tokens = 0  # prompt tokens found in the prefix cache
        self._to_drop: list[int] = []
        self._last_step_id = 0
        self._num_in_flight = 0  # plans

    # What the world tells the scheduler

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is over: finished, cancelled or failed. Does nothing if it is over already."""
        self.blame.forget(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif self.running.pop(sequence.sequence_id, None) is not None:
            self._leave_shards(sequence)

    def recompute(self, sequence: Sequence) -> bool:
        """Its scores were not finite: start over from its tokens, in blocks that nobody has shared.

        Whatever it was, nobody else shall find it in the prefix cache. False: it has been tried before.
        """
        self.allocator.prefix_cache.distrust(sequence.token_ids, self.allocator.block_size)
        if sequence.is_recomputed:
            return False
        sequence.is_recomputed = True
        if sequence.sequence_id in self.running:
            self._return_to_queue(sequence)
        return True

    def restart(self, allocator: BlockAllocator) -> None:
        """The shards lost everything: all that ran waits again, in the old order, for fresh blocks."""
        for sequence in reversed(self.running.values()):
            sequence.forget_shards()
            self.waiting.return_to_front(sequence)
        for sequence in self.waiting:
            sequence.num_plans_in_flight = 0
        self.running.clear()
        self._to_drop.clear()
        self.allocator = allocator
        self._last_step_id = 0
        self._num_in_flight = 0

    # What it answers

    def plan(self) -> StepPlan | None:
        """The next step. None if nothing can run now."""
        plan = StepPlan(self._last_step_id + 1)
        self._run_decodes(plan)
        budget = min(self.limits.max_step_tokens - len(plan.rows), self.prompt_budget.num_tokens)
        budget = self._run_prompts(plan, budget)
        self._admit(plan, budget)
        plan.drop, self._to_drop = self._to_drop, []
        if not plan.rows and not plan.drop:
            return None
        self._last_step_id = plan.step_id
        self._num_in_flight += 1
        return plan

    def confirm(self, plan: StepPlan, result: StepResult) -> list[tuple[Sequence, SampledToken]]:
        """Take a result in: blocks that became full are shared from now on.

        Returns the tokens for sequences still alive.
        """
        self._num_in_flight -= 1
        self.prompt_budget.stepped()
        confirmed: list[tuple[Sequence, SampledToken]] = []
        running, tokens, block_size = self.running, result.tokens, self.allocator.block_size
        for row in plan.rows:
            sequence = row.sequence
            sequence.num_plans_in_flight -= 1
            is_running = sequence.sequence_id in running
            if is_running:
                sequence.num_computed += row.num_tokens
                if sequence.num_computed >= (sequence.num_published_blocks + 1) * block_size:
                    self._publish_blocks(sequence)
            token = tokens.get(sequence.sequence_id)
            # A preempted sequence waits, and keeps the token that was under way; one that ended drops its
            # surplus.
            if row.samples and token is not None and (is_running or sequence in self.waiting):
                sequence.token_ids.append(token.token_id)
                if not is_running:
                    sequence.num_planned_tokens = len(sequence.token_ids)
                confirmed.append((sequence, token))
                if self.blame.has_suspects:
                    self._end_trial_if_cleared(sequence)
        return confirmed

    @property
    def next_to_admit(self) -> Sequence | None:
        return next(iter(self._candidates()), None)

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting and not self._to_drop

    # The parts of a plan

    def _run_decodes(self, plan: StepPlan) -> None:
        for sequence in list(self.running.values()):
            if sequence.num_pending != 1 or sequence.sequence_id not in self.running:
                continue  # preempted a moment ago, or a prompt, or all its output is on its way
            new_block_ids = self._grow(sequence)
            if new_block_ids is not None:
                self._run(plan, sequence, 1, new_block_ids)

    def _grow(self, sequence: Sequence) -> tuple[int, ...] | None:
        """Room for one more token, at the cost of the youngest.

        None if the sequence itself had to give way.
        """
        size = self.allocator.block_size
        if sequence.num_planned_computed < len(sequence.block_ids) * size:
            return ()
        num_blocks = ceil_div(sequence.num_planned_computed + 1, size)
        while (block_ids := self.allocator.take(num_blocks - len(sequence.block_ids))) is None:
            youngest = next(reversed(self.running.values()))
            self._return_to_queue(youngest)
            self.num_preemptions += 1
            if youngest is sequence:
                return None
        sequence.block_ids.extend(block_ids)
        return block_ids

    def _return_to_queue(self, sequence: Sequence) -> None:
        del self.running[sequence.sequence_id]
        self._leave_shards(sequence)
        sequence.forget_shards()
        self.waiting.return_to_front(sequence)

    def _end_trial_if_cleared(self, sequence: Sequence) -> None:
        """Who was cleared in a quarantine makes room for the next suspect."""
        was_quarantined = self.blame.prime_suspect is not None
        self.blame.stepped(sequence)
        is_next_due = was_quarantined and self.blame.prime_suspect not in (None, sequence)
        if is_next_due and sequence.sequence_id in self.running:
            self._return_to_queue(sequence)

    def _leave_shards(self, sequence: Sequence) -> None:
        self.allocator.release(sequence.block_ids)
        if sequence.is_on_shards:
            self._to_drop.append(sequence.sequence_id)

    def _run_prompts(self, plan: StepPlan, budget: int) -> int:
        for sequence in self.running.values():
            if budget <= 0:
                break
            if sequence.num_pending > 1:
                # Blocks for the whole prompt were granted at admission.
                budget -= self._run(plan, sequence, min(sequence.num_pending, budget), ())
        return budget

    def _admit(self, plan: StepPlan, budget: int) -> None:
        prompts = [other for other in self.running.values() if other.num_computed < other.num_prompt_tokens]
        for sequence in self._candidates():
            # A preempted sequence comes back once the results under way have told all its tokens.
            if (
                budget <= 0
                or len(self.running) == self.limits.max_sequences
                or sequence.num_plans_in_flight > 0
            ):
                break
            if sequence.num_first_tokens > budget:
                # An encoder's prompt cannot be cut: where memory has run short it is its step's only prompt.
                has_prompts = any(row.num_tokens > 1 for row in plan.rows)
                if has_prompts or sequence.num_first_tokens > self.limits.max_step_tokens - len(plan.rows):
                    break
                budget = sequence.num_first_tokens
            if any(self._is_worth_waiting_for(prompt, sequence) for prompt in prompts):
                continue
            allocation = self.allocator.allocate(
                sequence.token_ids,
                use_cache=sequence.may_share_blocks,
                reserve=self._num_growing(),
            )
            if allocation is None:
                break
            self.waiting.remove(sequence)
            self.running[sequence.sequence_id] = sequence
            sequence.block_ids = list(allocation.block_ids)
            sequence.num_planned_computed = sequence.num_computed = allocation.num_cached_tokens
            sequence.is_on_shards = True
            self.num_hit_tokens += allocation.num_cached_tokens
            plan.add.append(AddedSequence(sequence, allocation.num_cached_tokens))
            budget -= self._run(plan, sequence, min(sequence.num_pending, budget), allocation.block_ids)
            prompts.append(sequence)

    def _candidates(self) -> tuple[Sequence, ...]:
        """Who may be admitted, in order. In a quarantine the prime suspect, after the trial before it."""
        suspect = self.blame.prime_suspect
        if suspect is None:
            return tuple(self.waiting)
        is_free = not self.running and not self._num_in_flight
        return (suspect,) if is_free and suspect in self.waiting else ()

    def _is_worth_waiting_for(self, prompt: Sequence, sequence: Sequence) -> bool:
        """Whether the prefix cache will soon have, from `prompt` that runs, at least half of what `sequence`
        would have to compute now, and enough of it.
        """
        if not self.allocator.share_prefixes or not sequence.may_share_blocks:
            return False
        size = self.allocator.block_size
        num_tokens = len(sequence.token_ids)
        num_cached = prompt.num_computed // size * size
        num_shared = ceil_div(num_cached + ceil_div(num_tokens - num_cached, 2), size) * size
        if num_shared - num_cached < self.limits.min_tokens_to_wait_for:
            return False
        # The last token is always computed; a block that output goes into is not shared before it is full.
        if num_shared > min(num_tokens - 1, prompt.num_prompt_tokens):
            return False
        return prompt.token_ids[:num_shared] == sequence.token_ids[:num_shared]

    def _num_growing(self) -> int:
        """How many running sequences will need a block sooner or later.

        One is kept for each: admitting must not lead to preempting at once.
        """
        size = self.allocator.block_size
        return sum(sequence.max_tokens > len(sequence.block_ids) * size for sequence in self.running.values())

    def _run(
        self, plan: StepPlan, sequence: Sequence, num_tokens: int, new_block_ids: tuple[int, ...]
    ) -> int:
        sequence.num_planned_computed += num_tokens
        samples = sequence.num_planned_computed == sequence.num_planned_tokens
        if samples:
            sequence.num_planned_tokens += 1
        sequence.num_plans_in_flight += 1
        plan.rows.append(Row(sequence, num_tokens, new_block_ids, samples))
        return num_tokens

    def _publish_blocks(self, sequence: Sequence) -> None:
        size = self.allocator.block_size
        while (sequence.num_published_blocks + 1) * size <= sequence.num_computed:
            start = sequence.num_published_blocks * size
            key = block_key(sequence.last_published_key, sequence.token_ids[start : start + size])
            self.allocator.publish(key, sequence.block_ids[sequence.num_published_blocks])
            sequence.last_published_key = key
            sequence.num_published_blocks += 1
