"""The step loop: apply the plan, forward, sample, report.

A step is launched and finished apart. `step` only queues work on the device: the token that it samples
stays there and is what the next step feeds, so the next plan can run before anybody has read this one's
result. `finish` waits for the result and reads it. On a CPU there is nothing to wait for.

All ranks run the same plans. Rank 0 samples and the others follow, so a rank that rounds differently cannot
diverge.
"""

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tgi_shard.distributed import Group
from tgi_shard.models.model import Memory, Model
from tgi_shard.plan import FailedSequence, Masks, PromptLogprobs, StepPlan, StepResult
from tgi_shard.sampling.grammar import AllowedTokens
from tgi_shard.sampling.logprobs import TopTokens, token_logprobs
from tgi_shard.sampling.sampler import Sampler
from tgi_shard.slots import Rows, Slots

MAX_PROMPT_LOGITS = 512  # positions of a prompt whose logits are held at a time
PLANS_IN_FLIGHT = 2  # a step is finished before the second one after it is launched


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A step whose forward pass has been launched; nothing has been chosen yet."""

    step_id: int
    slots: np.ndarray  # [n] those that sample
    logits: Tensor | None  # [n, vocab_size]; None if n is 0
    prompt_logprobs: list[tuple[int, int, Tensor]]
    failed: list[FailedSequence]
    stopwatch: "Stopwatch"


@dataclass(frozen=True, slots=True)
class PendingResult:
    """A step that has been launched; its tensors are on the host once `done` has happened."""

    step_id: int
    sequence_ids: list[int]  # the rows that sampled
    added_at: np.ndarray  # [n] the steps in which those were added
    token_ids: Tensor  # [n] int64; negative where the scores were not finite
    logprobs: Tensor | None  # [n] float32; None on ranks that do not sample
    top_tokens: TopTokens | None
    prompt_logprobs: list[tuple[int, int, Tensor]]  # sequence id, position of the first, logprobs
    failed: list[FailedSequence]
    digest: int  # of what sampled: must be the same on every rank
    digest_of_rank_0: Tensor | None
    stopwatch: "Stopwatch"


@dataclass(frozen=True, slots=True)
class Broken:
    """A sequence whose scores were not finite."""

    sequence_id: int
    step_id: int


class Engine:
    def __init__(self, model: Model, kv_cache: Memory, slots: Slots, sampler: Sampler, group: Group) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.slots = slots
        self.sampler = sampler
        self.group = group
        self._broken: list[Broken] = []

    def forget(self) -> None:
        """Forget every sequence."""
        self.slots.clear()
        self._broken.clear()

    def step(self, plan: StepPlan, masks: Masks | None = None) -> PendingResult:
        """Launch a step. Raises only what concerns no single sequence."""
        return self.sample(self.forward(plan), masks)

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> Forwarded:
        """The first half of a step."""
        stopwatch = Stopwatch(self.slots.device)
        self._drop_broken(plan.step_id)
        rows, failed = self.slots.apply(plan)
        prompt_logprobs: list[tuple[int, int, Tensor]] = []
        sampling, logits = np.empty(0, np.int64), None
        for part in self._parts(rows):
            sampling, logits = self._forward(part, prompt_logprobs)
        stopwatch.lap()
        return Forwarded(plan.step_id, sampling, logits, prompt_logprobs, failed, stopwatch)

    @torch.inference_mode()
    def sample(self, step: Forwarded, masks: Masks | None = None) -> PendingResult:
        """The second half of a step. masks: for the sequences that have a grammar; else None."""
        step.stopwatch.lap()  # what passed since the forward pass was a wait for the masks
        pending = self._sample(step, masks)
        step.stopwatch.lap()
        return pending

    def _parts(self, rows: Rows) -> list[Rows]:
        """The forward passes of a step: one, but for long prompts whose every position needs logits.

        Those run ahead in slices, so that never more than about MAX_PROMPT_LOGITS rows of logits exist at a
        time. The last part holds every row, and the only tokens that sample.
        """
        if not len(rows):
            return []
        asking = np.flatnonzero(self.slots.wants_prompt_logprobs[rows.slots])
        if not asking.size:
            return [rows]
        parts, num_left = [], rows.num_tokens.copy()
        share = max(1, MAX_PROMPT_LOGITS // asking.size)
        for row in asking:
            while num_left[row] > share:
                num_tokens = min(MAX_PROMPT_LOGITS, num_left[row] - share)
                parts.append(Rows(rows.slots[row : row + 1], np.array([num_tokens])))
                num_left[row] -= num_tokens
        return [*parts, Rows(rows.slots, num_left)]

    def _forward(
        self, rows: Rows, prompt_logprobs: list[tuple[int, int, Tensor]]
    ) -> tuple[np.ndarray, Tensor | None]:
        """One forward pass.

        The slots that sample, and their logits [n, vocab_size]; prompt logprobs are appended.
        """
        slots, slots_of = self.slots, rows.slots
        does_sample = slots.reaches_end(rows)
        ends = np.cumsum(rows.num_tokens)
        last_tokens = ends[does_sample] - 1
        spans = []  # slot, first and last position of the prompt whose logits are wanted, index of the first
        for row in np.flatnonzero(slots.wants_prompt_logprobs[slots_of]):
            slot, num_tokens = slots_of[row], rows.num_tokens[row]
            start = int(slots.num_computed[slot])
            stop = int(min(start + num_tokens, slots.prompt_lens[slot] - 1))
            if start < stop:
                spans.append((slot, start, stop, ends[row] - num_tokens))
        logit_indices = last_tokens
        if spans:
            of_prompts = [np.arange(first, first + stop - start) for _, start, stop, first in spans]
            logit_indices = np.sort(np.concatenate((last_tokens, *of_prompts)))

        logits = self.model.forward(slots.inputs(rows, logit_indices), self.kv_cache)
        slots.computed(rows)
        if spans and self.group.rank == 0:
            for slot, start, stop, first in spans:
                offset = int(np.searchsorted(logit_indices, first))
                next_tokens = slots.prompt_tokens(slot, start + 1, stop + 1)
                values = token_logprobs(logits[offset : offset + stop - start], next_tokens)
                prompt_logprobs.append((slots.sequence_ids[slot], start + 1, _to_host(values)))
        if spans:
            of_last = torch.from_numpy(np.searchsorted(logit_indices, last_tokens)).to(logits.device)
            logits = logits.index_select(0, of_last)
        return slots_of[does_sample], logits if len(last_tokens) else None

    def _sample(self, step: Forwarded, masks: Masks | None) -> PendingResult:
        """Choose a token for each sequence that samples, and append it."""
        slots, slots_of, logits = self.slots, step.slots, step.logits
        token_ids = torch.empty(len(slots_of), dtype=torch.int64, device=slots.device)
        logprobs = top_tokens = digest_of_rank_0 = None
        sequence_ids = slots.ids(slots_of)
        digest = _digest(step.step_id, sequence_ids)
        if logits is not None:
            if self.group.rank == 0:
                sampled = self.sampler(
                    logits,
                    slots.sampling[slots_of],
                    slots.history(slots_of),
                    slots.top_n[slots_of],
                    slots.biases(slots_of),
                    None if masks is None else AllowedTokens.of(masks, sequence_ids),
                )
                token_ids = sampled.token_ids
                if sampled.top_tokens is not None:
                    top_tokens = sampled.top_tokens.moved(_to_host)
                logprobs = _to_host(sampled.logprobs)
            if self.group.world_size > 1:
                message = torch.cat((token_ids, token_ids.new_tensor([digest])))
                token_ids, digest_of_rank_0 = self.group.broadcast(message).split([len(slots_of), 1])
            slots.append(slots_of, token_ids)
        return PendingResult(
            step_id=step.step_id,
            sequence_ids=sequence_ids,
            added_at=slots.added_at[slots_of],
            token_ids=_to_host(token_ids),
            logprobs=logprobs,
            top_tokens=top_tokens,
            prompt_logprobs=step.prompt_logprobs,
            failed=step.failed,
            digest=digest,
            digest_of_rank_0=None if digest_of_rank_0 is None else _to_host(digest_of_rank_0),
            stopwatch=step.stopwatch,
        )

    @torch.inference_mode()
    def finish(self, pending: PendingResult) -> StepResult:
        """Wait for a launched step and read its result.

        Steps are finished in order, at most one is left open.
        """
        forward_ns, _, sample_ns, total_ns = pending.stopwatch.read_ns()
        if pending.digest_of_rank_0 is not None and pending.digest != int(pending.digest_of_rank_0):
            raise RuntimeError(f"the ranks do not run the same plans (step {pending.step_id})")
        token_ids = pending.token_ids.tolist()
        good, failed = self._without_broken(pending, token_ids)
        if (
            pending.logprobs is None
        ):  # nothing sampled, or not by this rank: the broken ones are noted, that is all
            sequence_ids, chosen, logprobs, top_tokens = [], [], [], {}
        else:
            sequence_ids = [pending.sequence_ids[row] for row in good]
            chosen = [token_ids[row] for row in good]
            all_logprobs = pending.logprobs.tolist()
            logprobs = [all_logprobs[row] for row in good]
            top_tokens = {} if pending.top_tokens is None else pending.top_tokens.lists()
        return StepResult(
            step_id=pending.step_id,
            sequence_ids=sequence_ids,
            token_ids=chosen,
            logprobs=logprobs,
            top_tokens=[top_tokens.get(row, []) for row in good] if top_tokens else [],
            prompt_logprobs=[
                PromptLogprobs(sequence_id, start, values.tolist())
                for sequence_id, start, values in pending.prompt_logprobs
            ],
            failed=pending.failed + failed,
            forward_ns=forward_ns,
            sample_ns=sample_ns,
            total_ns=total_ns,
        )

    # --- sequences whose scores are not finite
    #
    # A rank learns of them when it finishes the step, and the plan after that may be running already. They
    # leave at a step that is the same on every rank, the first that no rank can have launched by then;
    # until then they run along and what they sample is not reported.

    def _without_broken(
        self, pending: PendingResult, token_ids: Sequence[int]
    ) -> tuple[list[int], list[FailedSequence]]:
        """The rows to report, and those that broke in this step."""
        self._broken = [one for one in self._broken if one.step_id + PLANS_IN_FLIGHT >= pending.step_id]
        good, failed = [], []
        for row, (sequence_id, token_id) in enumerate(zip(pending.sequence_ids, token_ids, strict=True)):
            if any(
                broken.sequence_id == sequence_id and broken.step_id >= pending.added_at[row]
                for broken in self._broken
            ):
                continue
            if token_id >= 0:
                good.append(row)
                continue
            self._broken.append(Broken(sequence_id, pending.step_id))
            message = "the model's scores for this sequence are not finite"
            failed.append(FailedSequence(sequence_id, message, not_finite=True))
        return good, failed

    def _drop_broken(self, step_id: int) -> None:
        for broken in self._broken:
            if broken.step_id + PLANS_IN_FLIGHT > step_id:
                continue
            slot = self.slots.slot_of.get(broken.sequence_id)
            if slot is not None and self.slots.added_at[slot] <= broken.step_id:
                self.slots.refuse(broken.sequence_id)


class Stopwatch:
    """The laps of a step, in the device's time."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._laps: list[int] = []
        self._events: list[torch.cuda.Event] = []
        self.lap()

    def lap(self) -> None:
        self._laps.append(time.perf_counter_ns())
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)

    def read_ns(self) -> list[int]:
        """The length of each lap, then the time from start to now.

        Waits until the device has passed the last.
        """
        if self._is_cuda:
            self._events[-1].synchronize()
            pairs = zip(self._events, self._events[1:], strict=False)
            laps = [int(before.elapsed_time(after) * 1e6) for before, after in pairs]
        else:
            laps = [after - before for before, after in zip(self._laps, self._laps[1:], strict=False)]
        return [*laps, time.perf_counter_ns() - self._laps[0]]


def _digest(step_id: int, sequence_ids: list[int]) -> int:
    return zlib.crc32(np.array([step_id, *sequence_ids], np.uint64).tobytes())


def _to_host(values: Tensor) -> Tensor:
    """A copy that is under way when this returns, and there when the step's stopwatch has been read."""
    if values.device.type == "cpu":
        return values
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
