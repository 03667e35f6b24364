"""What a step is asked and what it answers, as our own data. The meanings are those of generate.proto."""

from dataclasses import dataclass, field

import numpy as np

from tgi_shard.sampling.bias import LogitBias
from tgi_shard.sampling.parameters import SamplingParameters


@dataclass(frozen=True, slots=True)
class AddSequence:
    sequence_id: int
    prompt_token_ids: np.ndarray  # int64
    output_token_ids: np.ndarray  # int64
    num_cached_tokens: int = 0
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    top_n_tokens: int = 0
    prompt_logprobs: bool = False
    logit_bias: LogitBias | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The columns `run_*` have one length, and run_num_new_blocks sums up to that of new_block_ids."""

    step_id: int
    drop_sequence_ids: list[int]
    add: list[AddSequence]
    run_sequence_ids: list[int]
    run_num_tokens: np.ndarray  # int64
    run_num_new_blocks: np.ndarray  # int64
    new_block_ids: np.ndarray  # int64
    await_masks: bool = False


@dataclass(frozen=True, slots=True)
class Masks:
    step_id: int
    sequence_ids: list[int]
    bits: np.ndarray  # [n, at least vocab_size / 8] uint8: bit t % 8 of byte t / 8 is token t's; 1: allowed


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    sequence_id: int
    start_position: int
    logprobs: list[float]


@dataclass(frozen=True, slots=True)
class FailedSequence:
    sequence_id: int
    message: str
    not_finite: bool = False  # its scores were


@dataclass(frozen=True, slots=True)
class StepResult:
    step_id: int
    # One row a sequence that sampled.
    sequence_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_tokens: list[list[tuple[int, float]]] = field(default_factory=list)  # empty: no row asked for any
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    failed: list[FailedSequence] = field(default_factory=list)
    forward_ns: int = 0
    sample_ns: int = 0
    total_ns: int = 0
