"""What this machine has: visible accelerators, the first GPU's name and memory, CPU cores."""

import math
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, slots=True)
class Devices:
    num_visible: int | None  # what the environment says (launcher.md, section 4.3); None: nothing
    card: str | None  # the first GPU, as `nvidia-h200`; None: the shards will run on the CPU
    memory_bytes: int | None  # of the first GPU
    num_cores: int  # CPU cores that this process may use


def detect(environ: Mapping[str, str]) -> Devices:
    has_gpu = _gpus_are_visible(environ) and _torch_knows_cuda()
    return Devices(
        num_visible=_num_visible(environ),
        card=_card() if has_gpu else None,
        memory_bytes=_memory_bytes() if has_gpu else None,
        num_cores=_num_cores(),
    )


def _num_visible(environ: Mapping[str, str]) -> int | None:
    if (devices := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len(devices.split(","))
    if (devices := environ.get("NVIDIA_VISIBLE_DEVICES")) is not None:
        if devices in ("all", "void"):
            uuids = nvidia_smi("--query-gpu=uuid", "--format=csv,noheader")
            return len(uuids) if uuids is not None else None
        return len(devices.split(","))
    if (devices := environ.get("ZE_AFFINITY_MASK")) is not None:
        return len(devices.split(","))
    return None


def _gpus_are_visible(environ: Mapping[str, str]) -> bool:
    return environ.get("CUDA_VISIBLE_DEVICES", "all").strip() not in ("", "-1")


def _torch_knows_cuda() -> bool:
    """Whether the installed torch could use a GPU: `2.13.0+cpu` could not. The launcher never imports it."""
    try:
        return not version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def _card() -> str | None:
    names = nvidia_smi("--query-gpu=gpu_name", "--format=csv,noheader")
    return names[0].replace(" ", "-").lower() if names else None


def _memory_bytes() -> int | None:
    """nvidia-smi prints MiB: `143771`, or `[N/A]` where memory is shared with the CPU."""
    totals = nvidia_smi("--query-gpu=memory.total", "--format=csv,noheader,nounits")
    return int(totals[0]) << 20 if totals and totals[0].isdecimal() else None


def nvidia_smi(*arguments: str) -> list[str] | None:
    """The lines it prints. None where there is no nvidia-smi, or it cannot talk to a driver."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (
        [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else None
    )


def _num_cores() -> int:
    """Cores in our affinity mask, or fewer where a container's CPU quota says so."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_CPU_MAX.read_text().split()
    except (OSError, ValueError):
        return num_cores
    if quota == "max":
        return num_cores
    return max(1, min(num_cores, math.ceil(int(quota) / int(period))))
