"""What `make test-matrix` puts on how many ranks, and the part of it that `make test` runs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import tiny_models
import ways


@dataclass(frozen=True)
class Case:
    model_type: str
    overrides: dict[str, Any] = field(default_factory=dict)
    through_transformers: bool = False

    def save(self, folder: Path) -> None:
        tiny_models.save(self.model_type, folder / "float32", **self.overrides)
        tiny_models.save(self.model_type, folder / "bfloat16", dtype=torch.bfloat16, **self.overrides)


@dataclass(frozen=True)
class Run:
    """One set of processes."""

    num_ranks: int
    is_quick: bool  # of `make test`

    @property
    def cases(self) -> dict[str, Case]:
        chosen = QUICK.get(self.num_ranks, {})
        if self.is_quick:
            return chosen
        return {name: case for name, case in EVERY[self.num_ranks].items() if name not in chosen}

    def ways(self, case: Case) -> list[tuple[str, str]]:
        """(dtype, way): all, but a single one where many processes share few cores."""
        possible = ways.possible(case.model_type)
        if self.num_ranks > 2:
            return [("float32", "chunked" if "chunked" in possible else "preempted")]
        return [*(("float32", way) for way in possible), ("bfloat16", "batched")]


def _through_transformers(model_types: tuple[str, ...]) -> dict[str, Case]:
    return {f"{name} through transformers": Case(name, {}, True) for name in model_types}


_FAMILIES = {
    name: Case(name)
    for name in (*tiny_models.FAMILIES, *tiny_models.ENCODER_DECODERS, *tiny_models.WITH_IMAGES)
}
_VARIANTS = {
    name: Case(*of) for name, of in (tiny_models.VARIANTS | tiny_models.ENCODER_DECODER_VARIANTS).items()
}
REPRESENTATIVES = {name: _FAMILIES[name] for name in (*tiny_models.REPRESENTATIVES, "t5", "bart")}
# Variants whose tensors ranks share in other ways.
_CUT_OTHERWISE = (
    *("llama-one-kv-head", "llama-biases", "cohere-qk-norm", "stablelm-parallel", "opt-350m", "t5-gated"),
    *("olmo2-one-kv-head", "falcon-40b", "falcon-rw", "gpt_bigcode-many-kv-heads", "bloom-six-heads"),
    *("mamba2-one-group", "mamba-tied-biases", "baichuan-2-13b-six-heads", "gpt_oss-mxfp4"),
    "deepseek_v3-fp8",
)
QUICK = {  # number of ranks -> what is put on them; on one rank the parity tests do more
    2: REPRESENTATIVES
    | {name: _VARIANTS[name] for name in _CUT_OTHERWISE}
    | _through_transformers(("vaultgemma", "ernie4_5")),
}
EVERY = {
    1: _FAMILIES | _VARIANTS | _through_transformers((*tiny_models.FALLBACK, *tiny_models.BOTH_WAYS)),
    2: _FAMILIES | _VARIANTS | _through_transformers(tiny_models.FALLBACK_ON_RANKS),
    4: _FAMILIES | {name: case for name, case in _VARIANTS.items() if not name.endswith("six-heads")},
}
RUNS = [Run(num_ranks, is_quick) for num_ranks in EVERY for is_quick in (True, False)]
