"""Mamba 2's recurrence over ragged batches, in chunks (Dao and Gu 2024, arXiv:2405.21060). For each head:

    state = exp(time step x decay) x state + time step x (input outer B)
    output = state . C

A head has one decay for all its channels, so the tokens of a chunk can be taken at once: each output is a
weighted sum of the chunk's inputs, plus what the state before the chunk gives.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CHUNK = 64


@dataclass(frozen=True, slots=True)
class Chunk:
    """Up to CHUNK tokens of some rows, side by side; shorter rows are padded with their own last token."""

    rows: Tensor  # [n] int64
    tokens: Tensor  # [n, width] int64
    is_token: Tensor  # [n, width] bool


@dataclass(frozen=True, slots=True)
class Chunks:
    """A ragged batch cut into chunks, each row's in its order."""

    chunks: tuple[Chunk, ...]

    @classmethod
    def of(cls, query_lens: tuple[int, ...], device: torch.device) -> "Chunks":
        """Rows of one token (decodes) get a chunk of their own: beside a prompt they would be all padding."""
        lengths = np.array(query_lens)
        starts = np.cumsum(lengths) - lengths
        decodes, prompts = np.flatnonzero(lengths == 1), np.flatnonzero(lengths > 1)
        parts = [(decodes, 0, 1)] if len(decodes) else []
        for first in range(0, int(lengths.max()) if len(prompts) else 0, CHUNK):
            rows = prompts[lengths[prompts] > first]
            parts.append((rows, first, min(CHUNK, int(lengths[rows].max()) - first)))
        chunks = []
        for rows, first, width in parts:
            places = first + np.arange(width)
            tokens = starts[rows, None] + np.minimum(places, lengths[rows, None] - 1)
            is_token = places < lengths[rows, None]
            chunks.append(Chunk(*(_to(values, device) for values in (rows, tokens, is_token))))
        return cls(tuple(chunks))


def scan(
    x: Tensor, time_step: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor, chunks: Chunks
) -> Tensor:
    """All float32. The outputs [T, heads, channels], fresh; `state` is moved on in place.

    x: [T, heads, channels]. time_step: [T, heads]. decay: [heads], negative. b, c: [T, groups, state_size];
    a group's heads lie together. state: [R, heads, channels, state_size], of each row before its first token.
    """
    y = torch.empty_like(x)
    for chunk in chunks.chunks:
        steps = time_step[chunk.tokens].masked_fill_(~chunk.is_token.unsqueeze(-1), 0)  # 0: nothing happens
        part, last = _chunk(
            x[chunk.tokens], steps, decay, b[chunk.tokens], c[chunk.tokens], state[chunk.rows]
        )
        y[chunk.tokens[chunk.is_token]] = part[chunk.is_token]
        state[chunk.rows] = last
    return y


def _chunk(
    x: Tensor, time_step: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """As `scan`, with [n, width] in place of [T]: outputs and new states."""
    heads_per_group, width = x.shape[2] // b.shape[2], x.shape[1]
    steps = time_step.transpose(1, 2)  # [n, heads, width]
    decays = (steps * decay.unsqueeze(-1)).cumsum(-1)  # from the chunk's start
    is_past = torch.ones(width, width, dtype=torch.bool, device=x.device).tril_()
    between = (decays.unsqueeze(-1) - decays.unsqueeze(-2)).masked_fill_(~is_past, -torch.inf).exp_()
    likeness = torch.einsum("nlgs,nmgs->nglm", c, b).repeat_interleave(heads_per_group, dim=1)
    weights = likeness.mul_(between).mul_(steps.unsqueeze(-2))  # [n, heads, to, from]
    y = torch.einsum("nhlm,nmhp->nlhp", weights, x)
    b, c = (values.repeat_interleave(heads_per_group, dim=2) for values in (b, c))  # [n, width, heads, state]
    y += torch.einsum("nlhs,nhps->nlhp", c, state) * decays.transpose(1, 2).exp().unsqueeze(-1)
    to_end = (decays[..., -1:] - decays).exp_().mul_(steps).transpose(1, 2).unsqueeze(-1)
    added = torch.einsum("nmhp,nmhs->nhps", x * to_end, b)
    return y, added.addcmul_(state, decays[..., -1].exp()[..., None, None])


def _to(values: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
