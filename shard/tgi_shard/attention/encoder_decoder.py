"""Attention of an encoder-decoder model over one paged store a layer, in plain torch.

A sequence's first slots hold what its decoder sees of the prompt: keys and values made from the encoder's
output. The slots behind them hold the decoder's own keys and values, from its start token on. So one gather
serves both attentions of a decoder layer, each with a mask of its own.

The encoder reads a prompt as a whole, in the step in which the sequence begins, and leaves nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tgi_shard.attention.reference import begun_blocks
from tgi_shard.kv_cache import KVCache
from tgi_shard.layers.relative_bias import RelativeBias
from tgi_shard.step import StepInputs

_TILE = 256  # queries whose scores exist at a time


@dataclass(frozen=True, slots=True)
class Layout:
    """Which tokens of a step the encoder reads, and which the decoder."""

    source_lens: tuple[int, ...]  # of each row: how many of its tokens are the encoder's
    read_lens: tuple[int, ...]  # of those, in this step: all or none
    target_lens: tuple[int, ...]  # of each row: how many tokens the decoder reads in this step
    source_tokens: Tensor | None  # indices among the step's tokens; None: there are none
    target_tokens: Tensor
    target_positions: Tensor  # counted from the start token

    @classmethod
    def of(cls, inputs: StepInputs, num_start_tokens: int) -> "Layout":
        """num_start_tokens: the last ones of every prompt, which the decoder reads."""
        source_lens = tuple(prompt_len - num_start_tokens for prompt_len in inputs.prompt_lens)
        source: list[int] = []
        target: list[int] = []
        positions: list[int] = []
        read_lens: list[int] = []
        start = 0
        for source_len, query_len, context_len in zip(
            source_lens, inputs.query_lens, inputs.context_lens_host, strict=True
        ):
            is_beginning = query_len == context_len
            read_lens.append(source_len if is_beginning else 0)
            source += range(start, start + read_lens[-1])
            target += range(start + read_lens[-1], start + query_len)
            positions += range(context_len - query_len + read_lens[-1] - source_len, context_len - source_len)
            start += query_len
        device = inputs.token_ids.device
        return cls(
            source_lens=source_lens,
            read_lens=tuple(read_lens),
            target_lens=tuple(
                query_len - read_len for query_len, read_len in zip(inputs.query_lens, read_lens, strict=True)
            ),
            source_tokens=torch.tensor(source).to(device, non_blocking=True) if source else None,
            target_tokens=torch.tensor(target).to(device, non_blocking=True),
            target_positions=torch.tensor(positions).to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True)
class SourceAttention:
    """Every prompt sees itself alone, all of it."""

    layout: Layout
    bias: RelativeBias | None
    scale: float

    def attend(self, query_key_value: Tensor) -> Tensor:
        """[tokens, 3, heads, head_dim] -> [tokens, heads x head_dim]."""
        num_tokens, _, num_heads, head_dim = query_key_value.shape
        out = query_key_value.new_empty((num_tokens, num_heads, head_dim))
        start = 0
        for length in self.layout.read_lens:
            rows = slice(start, start + length)
            self._attend_row(query_key_value[rows], out[rows])
            start += length
        return out.flatten(1)

    def _attend_row(self, query_key_value: Tensor, out: Tensor) -> None:
        query, key, value = query_key_value.permute(1, 2, 0, 3).unsqueeze(1)  # each [1, heads, tokens, dim]
        positions = torch.arange(len(out), device=out.device)
        for first in range(0, len(out), _TILE):
            tile = slice(first, first + _TILE)
            mask = None
            if self.bias is not None:
                mask = self.bias(positions - positions[tile].unsqueeze(1)).unsqueeze(0)
            attended = F.scaled_dot_product_attention(
                query[:, :, tile], key, value, attn_mask=mask, scale=self.scale
            )
            out[tile] = attended.squeeze(0).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows with equally many queries, and the slots that any of them sees."""

    token_indices: Tensor | None  # among the decoder's tokens, row after row; None: all of them in order
    num_rows: int
    block_ids: Tensor  # [rows x blocks]
    own_mask: Tensor  # [rows, heads or 1, queries, slots]: 0 or a bias, or -inf
    source_mask: Tensor  # [rows, 1, 1, slots]: 0 or -inf


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """What one layer's decoder sees in this step: keys and values of each group."""

    groups: tuple[tuple[Tensor, Tensor], ...]  # each [rows, heads, slots, head_dim]


@dataclass(frozen=True, slots=True)
class TargetAttention:
    """The decoder's two attentions."""

    kv_cache: KVCache
    begun_blocks: Tensor | None
    source_slots: Tensor | None
    target_slots: Tensor
    groups: tuple[_Group, ...]
    scale: float

    @classmethod
    def of(
        cls,
        inputs: StepInputs,
        layout: Layout,
        kv_cache: KVCache,
        bias: RelativeBias | None,
        scale: float,
        like: Tensor,
    ) -> "TargetAttention":
        """like: masks have its dtype and device."""
        source_tokens = layout.source_tokens
        return cls(
            kv_cache,
            begun_blocks(inputs, kv_cache.block_size),
            None if source_tokens is None else inputs.slot_ids.index_select(0, source_tokens),
            inputs.slot_ids.index_select(0, layout.target_tokens),
            tuple(_groups(inputs, layout, kv_cache.block_size, bias, like)),
            scale,
        )

    def remember(self, layer: int, source: Tensor | None, own: Tensor) -> LayerMemory:
        """Write keys and values of this step's prompts and of its decoder tokens, then gather.

        source, own: [tokens, 2, heads, head_dim].
        """
        store, slots = self.kv_cache.stores[layer], self.kv_cache.slots(layer)
        if self.begun_blocks is not None:
            store.index_fill_(0, self.begun_blocks, 0)
        if source is not None:
            assert self.source_slots is not None
            slots.index_copy_(0, self.source_slots, source)
        slots.index_copy_(0, self.target_slots, own)
        groups = []
        for group in self.groups:
            gathered = store.index_select(0, group.block_ids).view(group.num_rows, -1, *store.shape[2:])
            key, value = gathered.permute(2, 0, 3, 1, 4)
            groups.append((key, value))
        return LayerMemory(tuple(groups))

    def attend_own(self, memory: LayerMemory, query: Tensor) -> Tensor:
        """What the decoder has said so far. [tokens, heads, head_dim] -> [tokens, heads x head_dim]."""
        return self._attend(memory, query, [group.own_mask for group in self.groups])

    def attend_source(self, memory: LayerMemory, query: Tensor) -> Tensor:
        """The prompt. Shapes as above."""
        return self._attend(memory, query, [group.source_mask for group in self.groups])

    def _attend(self, memory: LayerMemory, query: Tensor, masks: list[Tensor]) -> Tensor:
        out = torch.empty_like(query)
        for group, (key, value), mask in zip(self.groups, memory.groups, masks, strict=True):
            indices = group.token_indices
            chosen = query if indices is None else query.index_select(0, indices)
            chosen = chosen.unflatten(0, (group.num_rows, -1)).transpose(1, 2)
            attended = F.scaled_dot_product_attention(chosen, key, value, attn_mask=mask, scale=self.scale)
            attended = attended.transpose(1, 2).flatten(0, 1)
            if indices is None:
                out.copy_(attended)
            else:
                out.index_copy_(0, indices, attended)
        return out.flatten(1)


def _groups(
    inputs: StepInputs, layout: Layout, block_size: int, bias: RelativeBias | None, like: Tensor
) -> Iterator[_Group]:
    """Rows of one token, which most are, together; each row that catches up with its answer alone."""
    together = [row for row, length in enumerate(layout.target_lens) if length == 1]
    alone = [[row] for row, length in enumerate(layout.target_lens) if length > 1]
    for rows in ([together] if together else []) + alone:
        yield _group(rows, inputs, layout, block_size, bias, like)


def _group(
    rows: list[int],
    inputs: StepInputs,
    layout: Layout,
    block_size: int,
    bias: RelativeBias | None,
    like: Tensor,
) -> _Group:
    device = like.device

    def of_rows(numbers: tuple[int, ...]) -> Tensor:
        return torch.tensor([numbers[row] for row in rows]).to(device, non_blocking=True)

    num_queries = layout.target_lens[rows[0]]
    context_lens, source_lens = of_rows(inputs.context_lens_host), of_rows(layout.source_lens)
    num_blocks = -(-max(inputs.context_lens_host[row] for row in rows) // block_size)
    last_blocks = (context_lens - 1) // block_size
    columns = torch.arange(num_blocks, device=device)
    columns = torch.minimum(columns, last_blocks.unsqueeze(1))  # padding repeats the row's own last block
    tables = inputs.block_tables.index_select(0, torch.tensor(rows).to(device, non_blocking=True))
    slots = torch.arange(num_blocks * block_size, device=device)
    queries = (context_lens - num_queries).unsqueeze(1) + torch.arange(num_queries, device=device)
    ahead = slots - queries.unsqueeze(2)  # [rows, queries, slots]
    is_hidden = (ahead > 0) | (slots < source_lens[:, None, None])
    own_mask = like.new_zeros(is_hidden.shape).unsqueeze(1)
    if bias is not None:
        own_mask = bias(ahead).transpose(0, 1)
    source_mask = like.new_zeros((len(rows), 1, 1, len(slots)))
    starts = [0]
    for length in layout.target_lens:
        starts.append(starts[-1] + length)
    indices = None
    if len(rows) < len(layout.target_lens):
        tokens = [starts[row] + i for row in rows for i in range(num_queries)]
        indices = torch.tensor(tokens).to(device, non_blocking=True)
    return _Group(
        token_indices=indices,
        num_rows=len(rows),
        block_ids=tables.gather(1, columns).flatten(),
        own_mask=own_mask.masked_fill(is_hidden.unsqueeze(1), float("-inf")),
        source_mask=source_mask.masked_fill(
            (slots >= source_lens.unsqueeze(1))[:, None, None], float("-inf")
        ),
    )
