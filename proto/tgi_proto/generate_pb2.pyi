from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InfoResponse(_message.Message):
    __slots__ = ("model_type", "dtype", "device_type", "vocab_size", "max_position_embeddings", "eos_token_ids", "world_size", "rank", "decoder_start_token_ids")
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_TYPE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_POSITION_EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    DECODER_START_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    model_type: str
    dtype: str
    device_type: str
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    world_size: int
    rank: int
    decoder_start_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model_type: _Optional[str] = ..., dtype: _Optional[str] = ..., device_type: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_position_embeddings: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., world_size: _Optional[int] = ..., rank: _Optional[int] = ..., decoder_start_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class HealthRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HealthResponse(_message.Message):
    __slots__ = ("last_step_id", "last_step_age_s", "current_step_age_s", "longest_step_s")
    LAST_STEP_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_AGE_S_FIELD_NUMBER: _ClassVar[int]
    CURRENT_STEP_AGE_S_FIELD_NUMBER: _ClassVar[int]
    LONGEST_STEP_S_FIELD_NUMBER: _ClassVar[int]
    last_step_id: int
    last_step_age_s: float
    current_step_age_s: float
    longest_step_s: float
    def __init__(self, last_step_id: _Optional[int] = ..., last_step_age_s: _Optional[float] = ..., current_step_age_s: _Optional[float] = ..., longest_step_s: _Optional[float] = ...) -> None: ...

class WarmupRequest(_message.Message):
    __slots__ = ("max_step_tokens", "max_total_tokens", "max_sequences")
    MAX_STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    max_step_tokens: int
    max_total_tokens: int
    max_sequences: int
    def __init__(self, max_step_tokens: _Optional[int] = ..., max_total_tokens: _Optional[int] = ..., max_sequences: _Optional[int] = ...) -> None: ...

class WarmupResponse(_message.Message):
    __slots__ = ("num_blocks", "block_size", "max_total_tokens", "blocks_are_states")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_ARE_STATES_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    block_size: int
    max_total_tokens: int
    blocks_are_states: bool
    def __init__(self, num_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., max_total_tokens: _Optional[int] = ..., blocks_are_states: bool = ...) -> None: ...

class SamplingParameters(_message.Message):
    __slots__ = ("do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "frequency_penalty", "output_frequency_penalty", "output_presence_penalty", "watermark", "seed", "choice", "min_p", "logit_bias_token_ids", "logit_bias_values")
    DO_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TYPICAL_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    typical_p: float
    repetition_penalty: float
    frequency_penalty: float
    output_frequency_penalty: float
    output_presence_penalty: float
    watermark: bool
    seed: int
    choice: int
    min_p: float
    logit_bias_token_ids: _containers.RepeatedScalarFieldContainer[int]
    logit_bias_values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, do_sample: bool = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., typical_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., output_frequency_penalty: _Optional[float] = ..., output_presence_penalty: _Optional[float] = ..., watermark: bool = ..., seed: _Optional[int] = ..., choice: _Optional[int] = ..., min_p: _Optional[float] = ..., logit_bias_token_ids: _Optional[_Iterable[int]] = ..., logit_bias_values: _Optional[_Iterable[float]] = ...) -> None: ...

class AddSequence(_message.Message):
    __slots__ = ("sequence_id", "prompt_token_ids", "output_token_ids", "num_cached_tokens", "sampling", "top_n_tokens", "prompt_logprobs", "traceparent")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TOP_N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_cached_tokens: int
    sampling: SamplingParameters
    top_n_tokens: int
    prompt_logprobs: bool
    traceparent: str
    def __init__(self, sequence_id: _Optional[int] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., num_cached_tokens: _Optional[int] = ..., sampling: _Optional[_Union[SamplingParameters, _Mapping]] = ..., top_n_tokens: _Optional[int] = ..., prompt_logprobs: bool = ..., traceparent: _Optional[str] = ...) -> None: ...

class RunRequest(_message.Message):
    __slots__ = ("plan", "masks")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    MASKS_FIELD_NUMBER: _ClassVar[int]
    plan: StepPlan
    masks: Masks
    def __init__(self, plan: _Optional[_Union[StepPlan, _Mapping]] = ..., masks: _Optional[_Union[Masks, _Mapping]] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("step_id", "drop_sequence_ids", "add", "run_sequence_ids", "run_num_tokens", "run_num_new_blocks", "new_block_ids", "await_masks")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    DROP_SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    ADD_FIELD_NUMBER: _ClassVar[int]
    RUN_SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    RUN_NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUN_NUM_NEW_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEW_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    AWAIT_MASKS_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    drop_sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    add: _containers.RepeatedCompositeFieldContainer[AddSequence]
    run_sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    run_num_tokens: _containers.RepeatedScalarFieldContainer[int]
    run_num_new_blocks: _containers.RepeatedScalarFieldContainer[int]
    new_block_ids: _containers.RepeatedScalarFieldContainer[int]
    await_masks: bool
    def __init__(self, step_id: _Optional[int] = ..., drop_sequence_ids: _Optional[_Iterable[int]] = ..., add: _Optional[_Iterable[_Union[AddSequence, _Mapping]]] = ..., run_sequence_ids: _Optional[_Iterable[int]] = ..., run_num_tokens: _Optional[_Iterable[int]] = ..., run_num_new_blocks: _Optional[_Iterable[int]] = ..., new_block_ids: _Optional[_Iterable[int]] = ..., await_masks: bool = ...) -> None: ...

class Masks(_message.Message):
    __slots__ = ("step_id", "sequence_ids", "bits")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    bits: bytes
    def __init__(self, step_id: _Optional[int] = ..., sequence_ids: _Optional[_Iterable[int]] = ..., bits: _Optional[bytes] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("step_id", "sequence_ids", "token_ids", "logprobs", "num_top_tokens", "top_token_ids", "top_logprobs", "prompt_logprobs", "failed", "forward_ns", "sample_ns", "total_ns")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    FORWARD_NS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_NS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_NS_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    num_top_tokens: _containers.RepeatedScalarFieldContainer[int]
    top_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PromptLogprobs]
    failed: _containers.RepeatedCompositeFieldContainer[FailedSequence]
    forward_ns: int
    sample_ns: int
    total_ns: int
    def __init__(self, step_id: _Optional[int] = ..., sequence_ids: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., num_top_tokens: _Optional[_Iterable[int]] = ..., top_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PromptLogprobs, _Mapping]]] = ..., failed: _Optional[_Iterable[_Union[FailedSequence, _Mapping]]] = ..., forward_ns: _Optional[int] = ..., sample_ns: _Optional[int] = ..., total_ns: _Optional[int] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("sequence_id", "start_position", "logprobs")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    START_POSITION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    start_position: int
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, sequence_id: _Optional[int] = ..., start_position: _Optional[int] = ..., logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class FailedSequence(_message.Message):
    __slots__ = ("sequence_id", "message", "not_finite")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    NOT_FINITE_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    message: str
    not_finite: bool
    def __init__(self, sequence_id: _Optional[int] = ..., message: _Optional[str] = ..., not_finite: bool = ...) -> None: ...
