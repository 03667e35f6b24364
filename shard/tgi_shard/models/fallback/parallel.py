"""A model of transformers cut for a group of ranks, by the plan that its class and config carry."""

import re
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from tgi_shard.distributed import Group
from tgi_shard.layers.linear import Linear, Piece, column_parallel, row_parallel
from tgi_shard.models.spec import UnsupportedModel
from tgi_shard.quantization.dense import Dense
from tgi_shard.weights.loading import Weights

# These leave a module whole on every rank: right, and for tables and norms cheap.
_WHOLE = ("embedding_rowwise", "replicated_with_grad_allreduce", "colwise_gather_output")


@dataclass
class _Shape:
    is_row_parallel: bool
    in_features: int
    out_features: int
    has_bias: bool


class Projection(nn.Module):
    """A linear of transformers' with our own in its place. Until it is loaded only its shapes are true."""

    def __init__(self, linear: nn.Linear, is_row_parallel: bool, world_size: int) -> None:
        super().__init__()
        self.shape = _Shape(is_row_parallel, linear.in_features, linear.out_features, linear.bias is not None)
        self.local_out = linear.out_features if is_row_parallel else linear.out_features // world_size
        self.linear: Linear | None = None

    def load(self, weights: Weights, name: str, group: Group) -> None:
        """name: the module's in the checkpoint."""
        shape, method = self.shape, Dense()
        if shape.is_row_parallel:
            self.linear = row_parallel(
                weights, method, name, shape.in_features, shape.out_features, shape.has_bias, group
            )
            return
        start = group.rank * self.local_out
        piece = Piece(name, start, start + self.local_out, shape.out_features)
        self.linear = column_parallel(weights, method, [piece], shape.in_features, shape.has_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.linear is None:
            assert x.is_meta
            return x.new_empty((*x.shape[:-1], self.local_out))
        return self.linear(x.flatten(0, -2)).view(*x.shape[:-1], self.local_out)


def check_group(model: PreTrainedModel, world_size: int) -> None:
    """Raises UnsupportedModel if heads cannot be shared out: a head is never cut."""
    config = model.config
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    for name, count in (("attention", num_heads), ("key-value", num_kv_heads)):
        if count % world_size:
            raise UnsupportedModel(
                f"{count} {name} heads of {config.model_type} cannot be divided evenly among "
                f"{world_size} shards"
            )


def cut(model: PreTrainedModel, group: Group) -> dict[str, Projection]:
    """Put a Projection in the place of each linear that ranks share; by name. Raises UnsupportedModel."""
    model_type = model.config.model_type
    plan = {_pattern(names): style for names, style in (model._tp_plan or {}).items()}
    placed: dict[str, Projection] = {}
    for name, module in list(model.named_modules()):
        style = next((style for pattern, style in plan.items() if pattern.fullmatch(name)), None)
        if style is None or style in _WHOLE:
            continue
        if style not in ("colwise", "rowwise") or type(module) is not nn.Linear:
            raise UnsupportedModel(
                f"{model_type} runs on one shard only: transformers' plan for several wants {name} {style}, "
                "which is not supported"
            )
        features = module.out_features if style == "colwise" else module.in_features
        if features % group.world_size:
            raise UnsupportedModel(
                f"{features} features of {name} cannot be divided evenly among {group.world_size} shards"
            )
        placed[name] = Projection(module, style == "rowwise", group.world_size)
        model.set_submodule(name, placed[name])
    if not placed:
        raise UnsupportedModel(
            f"{model_type} runs on one shard only: transformers has no plan for its layers on several"
        )
    return placed


def _pattern(names: str) -> re.Pattern[str]:
    return re.compile(re.escape(names).replace(r"\*", r"[^.]+"))
