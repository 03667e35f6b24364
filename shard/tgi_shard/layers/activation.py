"""Activations by the names that Hugging Face configs use, and the gate built from them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square_()


ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,  # three spellings of one formula
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _squared_relu,
}


def gate(activation: Activation, gate_up: Tensor) -> Tensor:
    """activation(first half) x second half of the last dimension, fresh: [.., 2n] -> [.., n]."""
    first, second = gate_up.chunk(2, dim=-1)
    return activation(first).mul_(second)


def clamped_gate(alpha: float, limit: float, gate_up: Tensor, sigmoid: Activation = torch.sigmoid) -> Tensor:
    """gate x sigmoid(alpha x gate) x (up + 1), both clamped, of alternate columns: [.., 2n] -> [.., n].

    That of gpt-oss (OpenAI 2025, arXiv:2508.10925).
    """
    first, second = gate_up.unflatten(-1, (-1, 2)).unbind(-1)
    first, second = first.clamp(max=limit), second.clamp(-limit, limit)
    return first * sigmoid(alpha * first) * (second + 1)
