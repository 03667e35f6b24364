"""Numbers as the wire has them: unsigned integers of a width, and 32-bit floats in their shortest form."""

import math
import struct
from typing import Annotated

from msgspec import Meta

UInt32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
UInt64 = Annotated[int, Meta(ge=0)]  # the upper bound does not fit into Meta: see check_uint64

_FLOAT32 = struct.Struct("<f")
_pack = _FLOAT32.pack


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
    if 0.01 <= value < 10.0 or -10.0 < value <= -0.01:  # like nearly all logprobs: no text is needed
        return _shortest_near_one(value)
    if not math.isfinite(value):
        return None
    wanted = _pack(value)
    for short in (float(f"{value:.6g}"), float(f"{value:.7g}"), float(f"{value:.8g}")):
        if _pack(short) == wanted:
            return short
    return float(f"{value:.9g}")  # nine digits tell every 32-bit float from its neighbours


def _shortest_near_one(value: float) -> float:
    """Of 0.01 <= |value| < 10. The products are exact: 24 bits times the 19 of 5**8."""
    wanted = _pack(value)
    scale = 1e6 if not -1.0 < value < 1.0 else 1e7 if not -0.1 < value < 0.1 else 1e8
    short = (
        round(value * scale) / scale
    )  # seven digits; here they lie wider apart than floats: with six, it ends in 0
    if _pack(short) == wanted:
        return short
    scale *= 10.0
    short = round(value * scale) / scale
    return short if _pack(short) == wanted else float(f"{value:.9g}")
