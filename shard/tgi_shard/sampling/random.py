"""Randomness without state: a draw is a function of (seed, choice, position) and of the row's scores.

The bits come from Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), written
in integer tensor operations, so a CPU and a GPU agree to the bit. The key is the seed; the counter is the
position of the token in the output and the choice. One uniform number then picks a token from the cumulative
distribution in the order of the token ids. So a token depends neither on the row of the batch, nor on the
neighbours, nor on what was drawn before.
"""

import numpy as np
import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10
BLOCK = 512  # tokens whose probabilities are summed first; the search then looks into one block alone


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox-4x32-10. counter: [4, n], key: [2, n], result: [4, n]; int64 that hold unsigned 32-bit words."""
    multipliers = torch.tensor(MULTIPLIERS, device=counter.device).unsqueeze(1)
    steps = torch.tensor(KEY_STEPS, device=counter.device).unsqueeze(1)
    even, odd = counter[0::2], counter[1::2]
    for _ in range(NUM_ROUNDS):
        product = even * multipliers  # 64 bits that wrap around: the sign bit is one of them
        high, low = (product >> 32) & WORD, product & WORD
        even, odd = high.flip(0) ^ odd ^ key, low.flip(0)
        key = (key + steps) & WORD
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def uniforms(seeds: np.ndarray, choices: np.ndarray, positions: np.ndarray, device: torch.device) -> Tensor:
    """One number in [0, 1) with 53 random bits for each row: [n] float64.

    seeds: [n] uint64. choices, positions: [n] integers below 2^32.
    """
    words = np.zeros((6, len(seeds)), dtype=np.int64)
    words[0] = positions
    words[2] = choices
    words[4] = seeds & np.uint64(WORD)
    words[5] = seeds >> np.uint64(32)
    on_device = torch.from_numpy(words).to(device)
    bits = philox(on_device[:4], on_device[4:])
    return ((bits[0] >> 5) * (1 << 26) + (bits[1] >> 6)).double() * 2.0**-53


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token where the cumulative distribution passes `uniform`: [n] int64. Never one of probability 0.

    probabilities: [n, vocab_size] float32, each row sums to about one. uniform: [n] float64 in [0, 1).
    Sums of blocks in float32, sums of sums in float64: also the rarest of 150,000 tokens keeps its share.
    A row with NaN gives some token id.
    """
    vocab_size = probabilities.shape[1]
    num_blocks, num_rest = divmod(vocab_size, BLOCK)
    whole = num_blocks * BLOCK
    sums = [probabilities[:, :whole].unflatten(1, (num_blocks, BLOCK)).sum(-1)] if num_blocks else []
    if num_rest:
        sums.append(probabilities[:, whole:].sum(-1, keepdim=True))
    block_ends = torch.cat(sums, 1).double().cumsum(1)
    target = _below(uniform.unsqueeze(1) * block_ends[:, -1:], block_ends[:, -1:])
    block = torch.searchsorted(block_ends, target, right=True).clamp_(max=block_ends.shape[1] - 1)
    block_start = block_ends.gather(1, (block - 1).clamp_(min=0)) * (block > 0)

    token_ids = block * BLOCK + torch.arange(BLOCK, device=block.device)
    inside = probabilities.gather(1, token_ids.clamp(max=vocab_size - 1)).double() * (token_ids < vocab_size)
    ends = inside.cumsum(1)
    offset = torch.searchsorted(ends, _below(target - block_start, ends[:, -1:]), right=True)
    return (block * BLOCK + offset).clamp_(max=vocab_size - 1).squeeze(1)


def _below(target: Tensor, limit: Tensor) -> Tensor:
    """`target`, less than `limit`: rounding must not carry the search past the last token with a share."""
    return torch.minimum(target, torch.nextafter(limit, torch.zeros_like(limit)))
