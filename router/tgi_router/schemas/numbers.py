"""Numbers as the wire has them: unsigned integers of a width, and 32-bit floats in their shortest form."""

import math
import struct
from typing import Annotated

from msgspec import Meta

UInt32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
UInt64 = Annotated[int, Meta(ge=0)]  # the upper bound does not fit into Meta: see check_uint64

_FLOAT32 = struct.Struct("<f")


def check_uint64(name: str, value: int | None) -> None:
    """Raises ValueError, which a struct's __post_init__ may let through: msgspec adds the path."""
    if value is not None and value >= 2**64:
        raise ValueError(f"invalid value: integer `{value}`, expected `{name}` to be u64")


def to_float32(value: float) -> float:
    """The nearest 32-bit float; infinite if it is too large for one."""
    try:
        return float(_FLOAT32.unpack(_FLOAT32.pack(value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def shortest_float32(value: float) -> float | None:
    """The double whose shortest form is that of the 32-bit float `value`; None (null) if it is not finite."""
    if not math.isfinite(value):
        return None
    wanted = _FLOAT32.pack(value)
    for num_digits in (6, 7, 8):
        short = float(f"{value:.{num_digits}g}")
        if _FLOAT32.pack(short) == wanted:
            return short
    return float(f"{value:.9g}")  # nine digits tell every 32-bit float from its neighbours
