"""Drives a loaded model through paged steps as the engine does, for comparison with transformers."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tgi_shard.models.registry import LoadedModel
from tgi_shard.step import StepInputs

CPU = torch.device("cpu")


@dataclass
class Row:
    """One sequence: its tokens so far, and how many of them have KV."""

    token_ids: list[int]
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    prompt_len: int = 0  # 0: all that is there to begin with

    def __post_init__(self) -> None:
        self.prompt_len = self.prompt_len or len(self.token_ids)


class Stepper:
    """Blocks are granted in a shuffled order, so that nothing passes by lying side by side."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        block_size: int = 16,
        num_blocks: int = 64,
        seed: int = 0,
        device: torch.device = CPU,
    ) -> None:
        self.loaded = loaded
        self.device = device
        kv_shape = loaded.model.kv_shape
        if not kv_shape.can_share_prefixes:
            block_size = 512  # one block a sequence
        self.kv_cache = kv_shape.allocate(num_blocks, block_size, self.device)
        self.free = list(range(num_blocks))
        random.Random(seed).shuffle(self.free)

    @torch.inference_mode()
    def step(self, scheduled: Sequence[tuple[Row, int]], *, all_logits: bool = False) -> Tensor:
        """Process so many tokens of each row. Logits of each row's last one, or of all: [L, vocab_size]."""
        return self.loaded.model.forward(self.inputs(scheduled, all_logits), self.kv_cache)

    def inputs(self, scheduled: Sequence[tuple[Row, int]], all_logits: bool = False) -> StepInputs:
        size = self.kv_cache.block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slot_ids: list[int] = []
        starts = [0]
        for row, num_tokens in scheduled:
            first, last = row.num_computed, row.num_computed + num_tokens
            while len(row.block_ids) * size < last:
                row.block_ids.append(self.free.pop())
            token_ids += row.token_ids[first:last]
            positions += range(first, last)
            slot_ids += (row.block_ids[p // size] * size + p % size for p in range(first, last))
            starts.append(len(token_ids))
            row.num_computed = last
        context_lens = [row.num_computed for row, _ in scheduled]
        width = max(len(row.block_ids) for row, _ in scheduled)
        tables = [row.block_ids + [0] * (width - len(row.block_ids)) for row, _ in scheduled]
        wanted = range(len(token_ids)) if all_logits else [stop - 1 for stop in starts[1:]]
        return StepInputs(
            token_ids=torch.tensor(token_ids, device=self.device),
            positions=torch.tensor(positions, device=self.device),
            slot_ids=torch.tensor(slot_ids, device=self.device),
            query_starts=torch.tensor(starts, device=self.device),
            context_lens=torch.tensor(context_lens, device=self.device),
            block_tables=torch.tensor(tables, device=self.device),
            logit_indices=torch.tensor(list(wanted), dtype=torch.int64, device=self.device),
            query_lens=tuple(num_tokens for _, num_tokens in scheduled),
            context_lens_host=tuple(context_lens),
            prompt_lens=tuple(row.prompt_len for row, _ in scheduled),
        )

    def prefill(self, prompts: Iterable[list[int]]) -> tuple[list[Row], Tensor]:
        """All prompts in one step; the logits of every prompt token, prompt after prompt."""
        rows = [Row(list(prompt)) for prompt in prompts]
        return rows, self.step([(row, len(row.token_ids)) for row in rows], all_logits=True)

    def decode(self, rows: Sequence[Row], logits: Tensor) -> Tensor:
        """Append each row's most likely token and compute it: the logits that follow, [rows, vocab_size]."""
        for row, token_id in zip(rows, logits.argmax(-1).tolist(), strict=True):
            row.token_ids.append(token_id)
        return self.step([(row, 1) for row in rows])
