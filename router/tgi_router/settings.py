"""The router's options, as one frozen value. `main.py` fills it from the command line and the environment."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tgi_router.text.reasoning import ReasoningFormat
from tgi_router.text.tool_parsers.registry import ToolCallFormat


@dataclass(frozen=True, slots=True)
class Settings:
    # where
    hostname: str
    port: int
    prometheus_port: int
    master_shard_uds_path: str  # rank 0's socket, ends in "-0"; the other ranks' end in "-1", "-2" …
    # what is served
    tokenizer_path: Path  # folder of the model: tokenizer.json, tokenizer_config.json, chat template
    served_model_name: str
    tokenizer_config_path: Path | None
    # limits of a request; None: what the shards' memory and the model allow
    max_concurrent_requests: int
    max_queue_time_s: float | None  # None: for ever
    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int | None
    max_total_tokens: int | None
    max_client_batch_size: int
    payload_limit: int  # bytes
    # batching
    max_batch_prefill_tokens: int
    max_batch_total_tokens: int | None
    max_batch_size: int | None
    prefix_caching: bool
    stall_timeout_s: float
    # behaviour
    validation_workers: int
    enable_prefill_logprobs: bool
    grammars: bool
    cors_allow_origin: tuple[str, ...]  # empty: any
    api_key: str | None = field(repr=False)  # never logged
    vertex_predict_path: str | None  # further paths, chosen by Vertex AI
    vertex_health_path: str | None
    compute_type: str
    docker_label: str | None
    git_sha: str | None
    tool_call_parser: ToolCallFormat | None  # None: what the chat template shows
    reasoning_parser: ReasoningFormat | Literal["auto"] | None
    # logs and traces
    otlp_endpoint: str | None  # of the collector, over gRPC; None: nothing is traced
    otlp_service_name: str
    json_output: bool
    log_level: str
    log_colors: bool

    @property
    def max_sequences(self) -> int:
        """That run at a time."""
        return self.max_batch_size or self.max_concurrent_requests
