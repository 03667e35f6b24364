"""The group of ranks that hold one model together: the only file that knows torch.distributed."""

import ipaddress
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """One rank's view. A group of one needs no torch.distributed: every call returns at once."""

    rank: int
    world_size: int
    # Whether sums are taken in the order of the ranks. Otherwise that order may depend on where in a tensor a
    # number stands, and on the tensor's size.
    sums_in_order: bool = False

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place; returns `x`."""
        if self.world_size > 1 and x.numel() > 0:
            if self.sums_in_order and self.world_size > 2:  # two numbers have one sum
                return x.copy_(self._sum_in_order(x))
            dist.all_reduce(x)
        return x

    def _sum_in_order(self, x: Tensor) -> Tensor:
        first, *others = self.all_gather(x.unsqueeze(0), dim=0)
        total = first.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        for part in others:
            total += part
        return total

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Every rank's `x` (all of one shape), concatenated in rank order along `dim`."""
        if self.world_size == 1:
            return x
        if x.numel() == 0:  # gloo aborts the process
            return torch.cat([x] * self.world_size, dim)
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x)
        return torch.cat(parts, dim)

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        """Rank `src`'s `x` on every rank, in place; returns `x`."""
        if self.world_size > 1:
            dist.broadcast(x, src)
        return x

    def all_reduce_min(self, value: int) -> int:
        """The smallest `value` of all ranks."""
        if self.world_size == 1:
            return value
        device = torch.device("cuda", torch.cuda.current_device()) if _is_nccl() else torch.device("cpu")
        least = torch.tensor(value, dtype=torch.int64, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least.item())


SINGLE = Group(0, 1)


def init_group(
    rank: int,
    world_size: int,
    device: torch.device,
    master_addr: str,
    master_port: int,
    timeout_s: float = 120.0,
    *,
    sums_in_order: bool = False,
) -> Group:
    """Meet the other ranks at `master_addr:master_port` (rank 0 listens there): NCCL on CUDA, gloo on CPU.

    Raises OSError if rank 0 cannot listen there, torch.distributed.DistError if not all come in `timeout_s`.
    """
    if world_size == 1:
        return SINGLE
    timeout = timedelta(seconds=timeout_s)
    is_local = _is_loopback(master_addr)
    if device.type != "cuda" and is_local:
        # Otherwise gloo listens on whatever address the host's name resolves to, for nobody.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback_interface())
    # The store would listen on all addresses by itself.
    listener = socket.create_server((master_addr, master_port)).detach() if is_local and rank == 0 else None
    store = dist.TCPStore(  # type: ignore[attr-defined]  # exported at run time
        master_addr, master_port, world_size, is_master=rank == 0, timeout=timeout, master_listen_fd=listener
    )
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    return Group(rank, world_size, sums_in_order)


def close_group(group: Group) -> None:
    """Leave the group. Nothing is waited for."""
    if group.world_size > 1:
        dist.destroy_process_group()


def _is_nccl() -> bool:
    return bool(dist.get_backend() == "nccl")


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _loopback_interface() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return "lo" if "lo" in names else "lo0"
