"""The options of one rank, checked and complete: all that the code below main.py learns of the outside."""

from dataclasses import dataclass
from pathlib import Path

import torch

from tgi_shard.models.rope_override import RopeOverride


@dataclass(frozen=True, slots=True)
class Settings:
    model_id: str
    model_path: Path  # the local folder with the model's files
    revision: str | None
    rank: int
    world_size: int
    master_addr: str
    master_port: int
    uds_path: str  # prefix: this rank listens at f"{uds_path}-{rank}"
    dtype: torch.dtype | None  # None: the checkpoint's own
    device: torch.device
    trust_remote_code: bool
    memory_fraction: float  # of the device's memory, for everything that this process keeps there
    watermark_gamma: float
    watermark_delta: float
    rope_override: RopeOverride | None
    max_input_tokens: int | None
    deterministic: bool  # answers are equal bit for bit, whatever else happens
    json_output: bool
    logger_level: str
    otlp_endpoint: str | None = None  # of a collector that gets spans; None: nothing is traced
    otlp_service_name: str = "text-generation-inference.server"


def device_of(rank: int) -> torch.device:
    """One GPU for each rank, in turns; the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", rank % torch.cuda.device_count())
    return torch.device("cpu")
