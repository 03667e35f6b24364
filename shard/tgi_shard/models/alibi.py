"""ALiBi's slopes, one a head, in the two ways that models were trained with (arXiv:2108.12409)."""

import math


def powers_of_two(num_heads: int) -> tuple[float, ...]:
    """BLOOM's and Falcon's: a geometric series; past a power of two, every other of the next finer."""
    closest = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / closest) for head in range(closest)]
    finer = [2 ** (-4 * (head + 1) / closest) for head in range(0, 2 * (num_heads - closest), 2)]
    return tuple(slopes + finer)


def cut_series(num_heads: int, bias_max: float) -> tuple[float, ...]:
    """MPT's: the series for the next power of two, its odd places before its even ones, cut short."""
    whole = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2 ** (-bias_max * (head + 1) / whole) for head in range(whole)]
    if whole == num_heads:
        return tuple(slopes)
    return tuple((slopes[1::2] + slopes[::2])[:num_heads])
