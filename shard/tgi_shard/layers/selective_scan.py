"""Mamba's recurrence over ragged batches (Gu and Dao 2023, arXiv:2312.00752). For each channel:

    state = exp(time step x decay) x state + time step x input x B
    output = state . C

A token's state needs the one before, so tokens are taken time step by time step, all rows at once: rows are
put in order of length, and those still running are the first ones. What does not depend on the state before
is computed for many time steps together, as many as SCRATCH_BYTES hold; what is left is one fused
multiplication and addition a time step.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SCRATCH_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Schedule:
    """The tokens of a ragged batch, time step after time step."""

    rows: Tensor  # [R] int64: longest first
    tokens: Tensor  # [T] int64: of each time step those of the rows still running, in the order of `rows`
    num_running: tuple[int, ...]  # rows in each time step, never rising

    @classmethod
    def of(cls, query_lens: tuple[int, ...], device: torch.device) -> "Schedule":
        lengths = np.array(query_lens)
        rows = np.argsort(-lengths, kind="stable")
        rank = np.empty_like(rows)
        rank[rows] = np.arange(len(rows))
        starts = np.cumsum(lengths) - lengths
        row_of_token = np.repeat(np.arange(len(lengths)), lengths)
        times = np.arange(len(row_of_token)) - starts[row_of_token]
        tokens = np.lexsort((rank[row_of_token], times))
        packed = torch.from_numpy(np.concatenate((rows, tokens)))
        if device.type != "cpu":
            packed = packed.pin_memory().to(device, non_blocking=True)
        on_device = packed.split([len(rows), len(tokens)])
        return cls(on_device[0], on_device[1], tuple(np.bincount(times).tolist()))


def selective_scan(
    x: Tensor, time_step: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """All float32. The outputs [T, channels] and the rows' new states, both fresh.

    x, time_step: [T, channels]. decay: [channels, state_size], negative. b, c: [T, state_size].
    state: [R, channels, state_size], of each row before its first token.
    """
    x, time_step, b, c = (values.index_select(0, schedule.tokens) for values in (x, time_step, b, c))
    last = state.index_select(0, schedule.rows)  # of each row, once it has ended; until then of some time ago
    running = last
    y = torch.empty_like(x)
    start = 0
    for sizes in _pieces(schedule.num_running, max(1, SCRATCH_BYTES // (decay.numel() * 4))):
        piece = slice(start, start + sum(sizes))
        factors = (time_step[piece].unsqueeze(-1) * decay).exp_()
        states = (time_step[piece] * x[piece]).unsqueeze(-1) * b[piece].unsqueeze(1)  # yet to be added up
        for size, factor, current in zip(sizes, factors.split(sizes), states.split(sizes), strict=True):
            last[size : len(running)] = running[size:]
            running = current.addcmul_(factor, running[:size])
        y[piece] = torch.bmm(states, c[piece].unsqueeze(-1)).squeeze(-1)
        last[: len(running)] = running
        running = last[: len(running)]
        start = piece.stop
    in_order = torch.empty_like(y).index_copy_(0, schedule.tokens, y)
    return in_order, torch.empty_like(last).index_copy_(0, schedule.rows, last)


def _pieces(num_running: tuple[int, ...], max_tokens: int) -> list[list[int]]:
    """Consecutive time steps of at most so many tokens together, but at least one time step each."""
    pieces: list[list[int]] = []
    num_tokens = max_tokens
    for size in num_running:
        if num_tokens + size > max_tokens:
            pieces.append([])
            num_tokens = 0
        pieces[-1].append(size)
        num_tokens += size
    return pieces
