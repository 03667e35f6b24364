"""How a sequence wants its tokens chosen, and the same for many sequences as columns."""

from dataclasses import astuple, dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """The meanings are those of the message in generate.proto. The fields stand in the order of `COLUMNS`."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    output_frequency_penalty: float = 0.0
    output_presence_penalty: float = 0.0
    watermark: bool = False
    seed: int = 0
    choice: int = 0
    min_p: float = 0.0

    def problem(self) -> str | None:
        """What makes these parameters impossible to follow; None if nothing does."""
        for name in ("temperature", "repetition_penalty"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                return f"`{name}` must be positive and finite, not {value}"
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                return f"`{name}` must be in (0, 1], not {value}"
        for name in ("frequency_penalty", "output_frequency_penalty", "output_presence_penalty"):
            value = getattr(self, name)
            if not np.isfinite(value):
                return f"`{name}` must be finite, not {value}"
        if not 0 <= self.min_p <= 1:
            return f"`min_p` must be in [0, 1], not {self.min_p}"
        return None

    def row(self) -> tuple[object, ...]:
        """One row of `COLUMNS`."""
        changes_scores = self.watermark or (
            self.temperature != 1
            or self.top_k > 0
            or self.top_p < 1
            or self.typical_p < 1
            or self.repetition_penalty != 1
            or self.frequency_penalty != 0
            or self.output_frequency_penalty != 0
            or self.output_presence_penalty != 0
            or self.min_p > 0
        )
        return (*astuple(self), changes_scores)


COLUMNS = np.dtype(
    [
        ("do_sample", np.bool_),
        ("temperature", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float32),
        ("typical_p", np.float32),
        ("repetition_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("output_frequency_penalty", np.float32),
        ("output_presence_penalty", np.float32),
        ("watermark", np.bool_),
        ("seed", np.uint64),
        ("choice", np.uint32),
        ("min_p", np.float32),
        ("changes_scores", np.bool_),  # anything but do_sample, seed and choice is in use
    ]
)
