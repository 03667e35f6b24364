"""Unquantized weights: the packed ones give what plain ones do, and do not make the process grow."""

import ctypes
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from tgi_shard.quantization.dense import Dense, can_pack, padded

needs_packing = pytest.mark.skipif(
    not can_pack(torch.zeros(1, 1, dtype=torch.bfloat16)), reason="this processor has no bfloat16"
)


def test_few_numbers_of_rows_are_asked_for_and_none_is_much_larger() -> None:
    for num_rows in range(1, 5000):
        assert num_rows <= padded(num_rows) <= num_rows * 9 / 8
        assert padded(padded(num_rows)) == padded(num_rows)
    assert len({padded(num_rows) for num_rows in range(1, 513)}) == 56
    assert padded(0) == 0


@needs_packing
@pytest.mark.parametrize("num_rows", [0, 1, 16, 17, 33, 65, 100])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_weights_multiply_like_plain_ones(num_rows: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    x, weight, bias = (
        torch.randn(*size, generator=generator).bfloat16() for size in ((num_rows, 96), (80, 96), (80,))
    )
    dense = Dense()
    tensors = dense.prepare({"weight": weight})
    assert set(tensors) == {"packed"}
    with torch.inference_mode():
        ours = dense.matmul(x, tensors, bias if has_bias else None)
    theirs = F.linear(x.float(), weight.float(), bias.float() if has_bias else None)
    assert ours.shape == (num_rows, 80)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=1e-1)


PROGRAM = """
import ctypes, torch
from tgi_shard.quantization.dense import Dense

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena b c d mapped f g used free j".split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Heap
dense = Dense()
tensors = dense.prepare({"weight": torch.randn(80, 96).bfloat16()})
with torch.inference_mode():
    dense.matmul(torch.randn(1, 96).bfloat16(), tensors, None)
    before = mallinfo2().used
    for num_rows in range(1, 513):
        dense.matmul(torch.randn(num_rows, 96).bfloat16(), tensors, None)
print((mallinfo2().used - before) / 1e6)
"""


@needs_packing
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc counts its heap since 2.33")
def test_steps_of_all_sizes_do_not_fill_the_memory() -> None:
    """Without a bound on the sizes it would be some 290 MB for this one weight, however small it is."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=150, check=True
    )
    assert float(done.stdout) < 60
