"""Token and position embeddings, and the head that turns hidden states back into scores over the vocabulary.

Ranks split the vocabulary evenly; the last one's part is padded with zeros where it does not divide.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tgi_shard.distributed import Group
from tgi_shard.quantization.method import LinearMethod, Tensors
from tgi_shard.weights.loading import Weights


@dataclass(frozen=True, slots=True)
class VocabPart:
    """Token ids [start, stop) are this rank's: the first of `num_rows` rows, a number all ranks share."""

    start: int
    stop: int
    num_rows: int

    @classmethod
    def of(cls, vocab_size: int, group: Group) -> "VocabPart":
        num_rows = -(-vocab_size // group.world_size)
        start = min(group.rank * num_rows, vocab_size)
        return cls(start, min(start + num_rows, vocab_size), num_rows)


def vocab_rows(weights: Weights, module: str, vocab_size: int, hidden_size: int, group: Group) -> Tensor:
    """This rank's rows of a table over the vocabulary: [VocabPart.num_rows, hidden]."""
    part = VocabPart.of(vocab_size, group)
    name, shape, rows = f"{module}.weight", (vocab_size, hidden_size), {0: (part.start, part.stop)}
    num_padding_rows = part.num_rows - (part.stop - part.start)
    if num_padding_rows == 0:
        return weights.map(name, shape, rows)
    padding = torch.zeros((num_padding_rows, hidden_size), dtype=weights.dtype, device=weights.device)
    return torch.cat([weights.read(name, shape, rows), padding])


@dataclass(frozen=True, slots=True)
class TokenEmbedding:
    table: Tensor  # from vocab_rows
    first_id: int  # of this rank's rows
    group: Group

    @classmethod
    def of(cls, table: Tensor, vocab_size: int, group: Group) -> "TokenEmbedding":
        return cls(table, VocabPart.of(vocab_size, group).start, group)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[num_tokens] int64 -> [num_tokens, hidden], fresh."""
        if self.group.world_size == 1:
            return F.embedding(token_ids, self.table)
        local = token_ids - self.first_id
        is_foreign = (local < 0) | (local >= len(self.table))
        hidden = F.embedding(local.masked_fill(is_foreign, 0), self.table)
        return self.group.all_reduce(hidden.masked_fill_(is_foreign.unsqueeze(-1), 0))


@dataclass(frozen=True, slots=True)
class PositionEmbedding:
    """Learned positions; every rank holds the whole table."""

    table: Tensor  # [max_positions, hidden]

    @classmethod
    def load(
        cls, weights: Weights, module: str, max_positions: int, hidden_size: int, offset: int
    ) -> "PositionEmbedding":
        """offset: the checkpoint's row of position 0."""
        num_rows = offset + max_positions
        return cls(weights.read(f"{module}.weight", (num_rows, hidden_size), {0: (offset, num_rows)}))

    def add_to(self, hidden: Tensor, positions: Tensor) -> None:
        """In place."""
        hidden.add_(F.embedding(positions, self.table))


@dataclass(frozen=True, slots=True)
class Head:
    method: LinearMethod
    tensors: Tensors
    bias: Tensor | None  # [vocab_size] float32, whole
    vocab_size: int
    group: Group
    scale: float = 1.0
    softcap: float | None = None  # logits end within (-softcap, softcap)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[num_rows, hidden] -> [num_rows, vocab_size] float32, whole on every rank."""
        gathered = self.group.all_gather(self.method.matmul(hidden, self.tensors, None))
        logits = gathered[:, : self.vocab_size].float()
        if self.bias is not None:
            logits = logits + self.bias
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh_().mul_(self.softcap)
        return logits
