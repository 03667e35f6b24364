"""A convolution over each sequence's own past, channel by channel, for ragged batches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_shard.layers.activation import Activation


@dataclass(frozen=True, slots=True)
class ConvPlaces:
    """Where a ragged batch lies in a buffer that holds, row after row, the row's history and its tokens."""

    history: Tensor  # [R, num_taps - 1] int64
    tokens: Tensor  # [T] int64
    tail: Tensor  # [R, num_taps - 1]: what will be the row's history

    @classmethod
    def of(cls, query_starts: Tensor, num_tokens: int, num_taps: int) -> "ConvPlaces":
        """query_starts: as in StepInputs."""
        device, num_rows, past = query_starts.device, len(query_starts) - 1, num_taps - 1
        rows = torch.arange(num_rows, device=device)
        row_of_token = rows.repeat_interleave(query_starts.diff(), output_size=num_tokens)
        offsets = torch.arange(past, device=device)
        return cls(
            history=(query_starts[:-1] + rows * past).unsqueeze(1) + offsets,
            tokens=torch.arange(num_tokens, device=device) + (row_of_token + 1) * past,
            tail=(query_starts[1:] + rows * past).unsqueeze(1) + offsets,
        )


@dataclass(frozen=True, slots=True)
class CausalConv:
    taps: Tensor  # [num_taps, channels] float32, that of the token itself last
    bias: Tensor | None  # [channels] float32
    activation: Activation

    def __call__(self, x: Tensor, history: Tensor, places: ConvPlaces) -> tuple[Tensor, Tensor]:
        """[T, channels] -> the same, fresh; and the new history.

        history: [R, num_taps - 1, channels], each row's inputs before those of `x`. Sums are in float32.
        """
        past = len(self.taps) - 1
        inputs = x.new_empty((len(x) + history.shape[0] * past, x.shape[1]))
        inputs.index_copy_(0, places.tokens, x)
        inputs.index_copy_(0, places.history.view(-1), history.flatten(0, 1))
        total = x.float() * self.taps[past]
        for tap in range(past):
            total.addcmul_(inputs.index_select(0, places.tokens - (past - tap)).float(), self.taps[tap])
        if self.bias is not None:
            total.add_(self.bias)
        tail = inputs.index_select(0, places.tail.view(-1)).view_as(history)
        return self.activation(total.to(x.dtype)), tail
