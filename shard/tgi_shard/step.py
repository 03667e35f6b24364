"""One forward pass as flat tensors: what the model needs to know of a step, and nothing of requests."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A ragged batch: the tokens of all scheduled sequences one after the other, prompts and decodes mixed.

    T tokens in R rows (one row a sequence). Row r's tokens are [query_starts[r], query_starts[r + 1]); they
    are the last ones of its context, so its token i (from 0) stands at position context_lens[r] -
    query_lens[r] + i and attends to everything before it and to itself.
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slot_ids: Tensor  # [T] int64: where each token's K and V are written (block id x block size + offset)
    query_starts: Tensor  # [R + 1] int64
    context_lens: Tensor  # [R] int64: tokens with KV once this step has written its own
    block_tables: Tensor  # [R, max blocks of a row] int64, padded with 0
    logit_indices: Tensor  # [L] int64: which of the T tokens need logits, ascending
    # The same numbers on the host, for backends that loop or size their buffers by them: no device
    # synchronisation.
    query_lens: tuple[int, ...]
    context_lens_host: tuple[int, ...]
    prompt_lens: tuple[int, ...]  # of each row: how many of its sequence's tokens are the prompt's
