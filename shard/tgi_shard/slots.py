"""The sequences that are alive on this rank, one slot each.

What only the device can know stands in tensors that live as long as the engine: the token ids (a sampled
one is appended there, and the next step reads it, without the host ever seeing it) and the block tables.
What follows from the plans stands on the host, in numpy columns: how many tokens are known and computed,
sampling parameters. So a step is laid out without waiting for the device, and all that it needs goes there
in one copy.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tgi_shard.plan import AddSequence, FailedSequence, StepPlan
from tgi_shard.sampling.bias import LogitBias
from tgi_shard.sampling.history import History
from tgi_shard.sampling.parameters import COLUMNS
from tgi_shard.step import StepInputs

NUM_SURPLUS_TOKENS = 2  # a sequence that ends at its limit may have been run ahead by the plans in flight


@dataclass(frozen=True, slots=True)
class Rows:
    """The sequences that run in a step, and how many tokens each."""

    slots: np.ndarray  # [R] int64
    num_tokens: np.ndarray  # [R] int64, at least 1

    def __len__(self) -> int:
        return len(self.slots)


class Slots:
    def __init__(
        self,
        *,
        max_sequences: int,
        max_total_tokens: int,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
        num_start_tokens: int = 0,
    ) -> None:
        """num_start_tokens: how many of a prompt's last tokens a decoder begins with, while an encoder reads
        the others, all in one step; 0: there is no encoder.
        """
        self.max_sequences = max_sequences
        self.max_total_tokens = max_total_tokens
        self.max_tokens = max_total_tokens + NUM_SURPLUS_TOKENS
        self.num_kv_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.device = device
        self.num_start_tokens = num_start_tokens
        self.max_blocks = -(-self.max_tokens // block_size) + 1
        # On the device. Not initialised: what lies behind a sequence's end is never read.
        self.token_ids = torch.empty((max_sequences, self.max_tokens), dtype=torch.int32, device=device)
        self.block_tables = torch.zeros((max_sequences, self.max_blocks), dtype=torch.int64, device=device)
        # On the host, by slot.
        self.sequence_ids = [0] * max_sequences
        self.num_known = np.zeros(max_sequences, np.int64)  # tokens, the one still on its way included
        self.num_computed = np.zeros(max_sequences, np.int64)  # tokens with KV
        self.prompt_lens = np.zeros(max_sequences, np.int64)
        self.num_blocks = np.zeros(max_sequences, np.int64)
        self.sampling = np.zeros(max_sequences, COLUMNS)
        self.logit_biases: list[LogitBias | None] = [None] * max_sequences
        self.top_n = np.zeros(max_sequences, np.int64)
        self.wants_prompt_logprobs = np.zeros(max_sequences, np.bool_)
        self.added_at = np.zeros(max_sequences, np.int64)  # step id
        self.clear()

    def clear(self) -> None:
        """Forget every sequence."""
        self.slot_of: dict[int, int] = {}
        self._free = list(range(self.max_sequences))[::-1]
        self._refused: set[int] = set()  # failed sequences that plans under way may still name

    # --- drop, add, grow

    def apply(self, plan: StepPlan) -> tuple[Rows, list[FailedSequence]]:
        """Drop, add and grow as `plan` says: what runs, and the sequences for which that was impossible.

        Those are dropped, their neighbours not affected. The same plans drop the same sequences on every
        rank.
        """
        failed: dict[int, str] = {}
        for sequence_id in plan.drop_sequence_ids:
            self.drop(sequence_id)
            self._refused.discard(sequence_id)
        self._add(plan.add, plan.step_id, failed)
        rows = self._rows(plan, failed)
        return rows, [FailedSequence(sequence_id, message) for sequence_id, message in failed.items()]

    def drop(self, sequence_id: int) -> None:
        slot = self.slot_of.pop(sequence_id, None)
        if slot is not None:
            self._free.append(slot)

    def refuse(self, sequence_id: int) -> None:
        """Drop a failed sequence, and pass over it in silence until the plans drop it or add it anew."""
        self.drop(sequence_id)
        self._refused.add(sequence_id)

    def _add(self, sequences: list[AddSequence], step_id: int, failed: dict[int, str]) -> None:
        places, token_ids = [], []
        for sequence in sequences:
            self._refused.discard(sequence.sequence_id)
            known = np.concatenate((sequence.prompt_token_ids, sequence.output_token_ids))
            problem = self._problem(sequence, known)
            if problem is not None:
                failed[sequence.sequence_id] = problem
                self.refuse(sequence.sequence_id)
                continue
            slot = self.slot_of[sequence.sequence_id] = self._free.pop()
            self.sequence_ids[slot] = sequence.sequence_id
            self.num_known[slot] = len(known)
            self.num_computed[slot] = sequence.num_cached_tokens
            self.prompt_lens[slot] = len(sequence.prompt_token_ids)
            self.num_blocks[slot] = 0
            self.sampling[slot] = sequence.sampling.row()
            self.logit_biases[slot] = sequence.logit_bias
            self.top_n[slot] = sequence.top_n_tokens
            self.wants_prompt_logprobs[slot] = sequence.prompt_logprobs
            self.added_at[slot] = step_id
            places.append(slot * self.max_tokens + np.arange(len(known)))
            token_ids.append(known)
        if places:
            place, value = self._to_device(np.stack((np.concatenate(places), np.concatenate(token_ids))))
            self.token_ids.view(-1).index_copy_(0, place, value.int())

    def _problem(self, sequence: AddSequence, known: np.ndarray) -> str | None:
        if sequence.sequence_id in self.slot_of:
            return f"sequence {sequence.sequence_id} is alive already"
        if not self._free:
            return f"more than {self.max_sequences} sequences"
        if len(sequence.prompt_token_ids) <= self.num_start_tokens:
            return "the prompt has no token"
        if self.num_start_tokens and (sequence.num_cached_tokens or sequence.prompt_logprobs):
            return "an encoder reads the prompt: num_cached_tokens must be 0 and prompt_logprobs false"
        if len(known) >= self.max_tokens:
            return f"{len(known)} tokens are more than max_total_tokens = {self.max_total_tokens}"
        if known.max() >= self.vocab_size:
            return f"token id {known.max()} is not below the vocabulary's size, {self.vocab_size}"
        if sequence.num_cached_tokens >= len(known):
            return f"num_cached_tokens is {sequence.num_cached_tokens}, with {len(known)} tokens in all"
        if sequence.prompt_logprobs and sequence.num_cached_tokens:
            return f"prompt_logprobs, but num_cached_tokens is {sequence.num_cached_tokens}"
        if sequence.logit_bias is not None and (problem := sequence.logit_bias.problem(self.vocab_size)):
            return problem
        return sequence.sampling.problem()

    def _rows(self, plan: StepPlan, failed: dict[int, str]) -> Rows:
        """Grant the new blocks, and find the rows that run."""
        ids = plan.run_sequence_ids
        slots = np.fromiter((self.slot_of.get(sequence_id, -1) for sequence_id in ids), np.int64, len(ids))
        num_tokens, num_new_blocks = plan.run_num_tokens, plan.run_num_new_blocks
        held = self.num_blocks[slots] + num_new_blocks
        contexts = self.num_computed[slots] + num_tokens
        is_good = (
            (slots >= 0)
            & (num_tokens >= 1)
            & (contexts <= self.num_known[slots])
            & (contexts < self.max_tokens)  # the token that it may sample has a place as well
            & (contexts <= held * self.block_size)
            & (held <= self.max_blocks)
        )
        if self.num_start_tokens:
            is_good &= contexts >= self.prompt_lens[slots]
        new_block_ids = plan.new_block_ids
        if len(new_block_ids) and new_block_ids.max() >= self.num_kv_blocks:
            owners = np.repeat(np.arange(len(ids)), num_new_blocks)
            is_good[owners[new_block_ids >= self.num_kv_blocks]] = False
        if len(set(ids)) < len(ids):
            is_good &= np.array([ids.count(sequence_id) == 1 for sequence_id in ids])
        if not is_good.all():
            for row in np.flatnonzero(~is_good):
                sequence_id = ids[row]
                if sequence_id not in self._refused:
                    failed[sequence_id] = self._complaint(plan, int(row), int(slots[row]))
                    self.refuse(sequence_id)
            new_block_ids = new_block_ids[np.repeat(is_good, num_new_blocks)]
            slots, num_tokens, num_new_blocks, held = (
                column[is_good] for column in (slots, num_tokens, num_new_blocks, held)
            )
        if len(new_block_ids):
            ends = np.cumsum(num_new_blocks)
            columns = np.arange(ends[-1]) + np.repeat(held - ends, num_new_blocks)
            places = np.repeat(slots, num_new_blocks) * self.max_blocks + columns
            place, block_id = self._to_device(np.stack((places, new_block_ids)))
            self.block_tables.view(-1).index_copy_(0, place, block_id)
            self.num_blocks[slots] = held
        return Rows(slots, num_tokens)

    def _complaint(self, plan: StepPlan, row: int, slot: int) -> str:
        sequence_id, num_tokens = plan.run_sequence_ids[row], plan.run_num_tokens[row]
        if plan.run_sequence_ids.count(sequence_id) > 1:
            return "the plan runs the sequence twice"
        if slot < 0:
            return f"there is no sequence {sequence_id}"
        num_missing = self.num_known[slot] - self.num_computed[slot]
        if not 1 <= num_tokens <= num_missing:
            return f"the plan runs {num_tokens} tokens, and {num_missing} are to compute"
        if self.num_computed[slot] + num_tokens >= self.max_tokens:
            return f"the sequence outgrows max_total_tokens = {self.max_total_tokens}"
        if self.num_start_tokens and self.num_computed[slot] + num_tokens < self.prompt_lens[slot]:
            return f"the plan runs {num_tokens} tokens of a prompt of {self.prompt_lens[slot]}: it needs all"
        start = int(plan.run_num_new_blocks[:row].sum())
        granted = plan.new_block_ids[start : start + plan.run_num_new_blocks[row]]
        if len(granted) and granted.max() >= self.num_kv_blocks:
            return f"block id {granted.max()} is not below the number of blocks, {self.num_kv_blocks}"
        num_blocks, context = self.num_blocks[slot] + len(granted), self.num_computed[slot] + num_tokens
        return f"{num_blocks} blocks of {self.block_size} do not suit {context} tokens"

    # --- one step

    def reaches_end(self, rows: Rows) -> np.ndarray:
        """Whose computed tokens catch up with their known ones: [R] bool. Those sample."""
        reached: np.ndarray = self.num_computed[rows.slots] + rows.num_tokens == self.num_known[rows.slots]
        return reached

    def inputs(self, rows: Rows, logit_indices: np.ndarray) -> StepInputs:
        """The forward pass of `rows`. logit_indices: which of its tokens need logits."""
        slots, query_lens = rows.slots, rows.num_tokens
        context_lens = self.num_computed[slots] + query_lens
        query_starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(query_lens, out=query_starts[1:])
        num_tokens = int(query_starts[-1])
        row_of_token = np.repeat(np.arange(len(rows)), query_lens)
        positions = np.arange(num_tokens) + (context_lens - query_starts[1:])[row_of_token]
        width = -(-int(context_lens.max()) // self.block_size)
        packed = self._to_device(
            np.concatenate(
                (
                    positions,
                    slots[row_of_token] * self.max_tokens + positions,
                    row_of_token * width + positions // self.block_size,
                    positions % self.block_size,
                    slots,
                    query_starts,
                    context_lens,
                    logit_indices,
                )
            )
        )
        sizes = [num_tokens] * 4 + [len(rows), len(rows) + 1, len(rows), len(logit_indices)]
        on_device = packed.split(sizes)
        block_tables = self.block_tables[:, :width].index_select(0, on_device[4])
        block_ids = block_tables.view(-1).index_select(0, on_device[2])
        return StepInputs(
            token_ids=self.token_ids.view(-1).index_select(0, on_device[1]).long(),
            positions=on_device[0],
            slot_ids=torch.add(on_device[3], block_ids, alpha=self.block_size),
            query_starts=on_device[5],
            context_lens=on_device[6],
            block_tables=block_tables,
            logit_indices=on_device[7],
            query_lens=tuple(query_lens.tolist()),
            context_lens_host=tuple(context_lens.tolist()),
            prompt_lens=tuple(self.prompt_lens[slots].tolist()),
        )

    def history(self, slots: np.ndarray) -> History:
        prompt_lens = self.prompt_lens[slots]
        num_unsaid = (
            prompt_lens - self.num_start_tokens if self.num_start_tokens else np.zeros_like(prompt_lens)
        )
        return History(self.token_ids, slots, self.num_known[slots], prompt_lens, num_unsaid)

    def biases(self, slots: np.ndarray) -> list[LogitBias | None] | None:
        """One for each of `slots`; None if none of them has one."""
        biases = [self.logit_biases[slot] for slot in slots]
        return biases if any(bias is not None for bias in biases) else None

    def computed(self, rows: Rows) -> None:
        """The forward pass of `rows` has been launched."""
        self.num_computed[rows.slots] += rows.num_tokens

    def append(self, slots: np.ndarray, token_ids: Tensor) -> None:
        """What was sampled for `slots` ([n] on the device; negative: nothing) becomes their next token."""
        places = self._to_device(slots * self.max_tokens + self.num_known[slots])
        self.token_ids.view(-1).index_copy_(0, places, token_ids.clamp(min=0).int())
        self.num_known[slots] += 1

    def prompt_tokens(self, slot: int, start: int, stop: int) -> Tensor:
        """Tokens [start, stop) of a slot, on the device: int64."""
        return self.token_ids[slot, start:stop].long()

    def ids(self, slots: Iterable[int]) -> list[int]:
        return [self.sequence_ids[slot] for slot in slots]

    def _to_device(self, values: np.ndarray) -> Tensor:
        """Without waiting: from a pinned buffer that is not used again while the copy is under way."""
        tensor = torch.from_numpy(values)
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)
