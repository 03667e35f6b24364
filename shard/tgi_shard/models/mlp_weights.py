"""A rank's part of an MLP, or of every expert of a mixture: some of the intermediate features."""

from functools import partial

import torch

from tgi_shard.distributed import SINGLE
from tgi_shard.layers.activation import ACTIVATIONS, Activation, clamped_gate, gate
from tgi_shard.layers.linear import Linear, Piece, column_parallel, replicated, row_parallel
from tgi_shard.layers.mlp import MLP
from tgi_shard.layers.moe import GroupedTopK, MoE, Routing, SharedExpert
from tgi_shard.models import spec as specs
from tgi_shard.models.part import Part, pieces
from tgi_shard.quantization.method import LinearMethod
from tgi_shard.weights.loading import Excerpt
from tgi_shard.weights.mxfp4 import MXFP4
from tgi_shard.weights.names import Experts


def load_mlp(part: Part, layer: int, prefix: str) -> MLP | MoE:
    moe, names = part.spec.moe, part.spec.names
    if moe is not None and moe.layers[layer]:
        assert names.experts is not None
        return _load_moe(part, moe, names.experts, prefix)
    mlp = part.spec.mlp
    inner = _inner_pieces(part, mlp, prefix, names.mlp_in)
    return _load_dense(part, mlp, inner, prefix + names.mlp_out, is_summed=part.is_summed)


def _inner_pieces(part: Part, mlp: specs.MLP, prefix: str, modules: tuple[str, ...]) -> list[Piece]:
    count = 2 if mlp.is_gated else 1
    return pieces(
        prefix, modules, [mlp.intermediate_size] * count, [part.local(mlp.intermediate_size)] * count
    )


def _load_dense(
    part: Part,
    mlp: specs.MLP,
    inner: list[Piece],
    out: str,
    *,
    is_summed: bool,
    between: Activation | None = None,
    methods: tuple[LinearMethod, LinearMethod] | None = None,
) -> MLP:
    """between: in place of the MLP's own activation or gate. methods: of the inner and the outer linear."""
    hidden_size = part.spec.dims.hidden_size
    activation = part.numerics.elementwise(ACTIVATIONS[mlp.activation])
    in_method, out_method = methods or (part.method, part.method)
    return MLP(
        inner=column_parallel(part.weights, in_method, inner, hidden_size, mlp.has_bias),
        between=between or (partial(gate, activation) if mlp.is_gated else activation),
        out=row_parallel(
            part.weights,
            out_method,
            out,
            mlp.intermediate_size,
            hidden_size,
            mlp.has_bias,
            part.group,
            is_summed=is_summed,
        ),
    )


def _load_moe(part: Part, moe: specs.MoE, names: Experts, prefix: str) -> MoE:
    for expert in range(moe.num_experts):
        for ours, theirs in names.stacked:
            part.weights.excerpts[prefix + ours.format(expert=expert)] = Excerpt(
                prefix + theirs, expert, moe.num_experts
            )
        for module in (*names.mlp_in, names.mlp_out) if names.is_mxfp4 else ():
            name = prefix + module.format(expert=expert)
            part.weights.packed[f"{name}.weight"] = MXFP4(f"{name}.blocks", f"{name}.scales")
    experts = tuple(_load_expert(part, moe, names, prefix, expert) for expert in range(moe.num_experts))
    return MoE(
        router=_load_router(part, moe, prefix + names.router),
        router_dtype=torch.float32 if moe.has_wide_router else part.weights.dtype,
        routing=part.numerics.routing(_routing(part, moe, names, prefix)),
        experts=experts,
        shared=_load_shared(part, moe, names, prefix),
        group=part.group,
        weighs_inputs=moe.weighs_inputs,
    )


def _load_router(part: Part, moe: specs.MoE, module: str) -> Linear:
    hidden_size, method = part.spec.dims.hidden_size, part.numerics.dense("out_in")
    if not moe.has_wide_router:
        return replicated(part.weights, method, module, hidden_size, moe.num_experts, moe.has_bias)
    assert not moe.has_bias
    shape = (moe.num_experts, hidden_size)
    weight = part.weights.read(f"{module}.weight", shape, dtype=torch.float32)
    return Linear(method, method.prepare({"weight": weight}), None, SINGLE)


def _routing(part: Part, moe: specs.MoE, names: Experts, prefix: str) -> Routing:
    if names.correction is None:
        return moe.routing
    assert isinstance(moe.routing, GroupedTopK)
    correction = part.weights.read(prefix + names.correction, (moe.num_experts,), dtype=torch.float32)
    return partial(moe.routing, correction=correction)


def _load_expert(part: Part, moe: specs.MoE, names: Experts, prefix: str, expert: int) -> MLP:
    mlp = specs.MLP(moe.intermediate_size, moe.activation, is_gated=True, has_bias=moe.has_bias)
    modules = tuple(module.format(expert=expert) for module in names.mlp_in)
    if moe.clamped_gate is None:
        inner, between = _inner_pieces(part, mlp, prefix, modules), None
    else:
        (module,) = modules  # its rows alternate: a rank's features of gate and up are one range
        start, stop = part.local(mlp.intermediate_size)
        inner = [Piece(prefix + module, 2 * start, 2 * stop, 2 * mlp.intermediate_size)]
        sigmoid = part.numerics.elementwise(torch.sigmoid)
        between = partial(clamped_gate, *moe.clamped_gate, sigmoid=sigmoid)
    return _load_dense(
        part,
        mlp,
        inner,
        prefix + names.mlp_out.format(expert=expert),
        is_summed=False,
        between=between,
        methods=(part.numerics.dense(moe.in_layout), part.numerics.dense(moe.out_layout)),
    )


def _load_shared(part: Part, moe: specs.MoE, names: Experts, prefix: str) -> SharedExpert | None:
    if moe.shared_size is None:
        return None
    mlp = specs.MLP(moe.shared_size, moe.activation, is_gated=True, has_bias=False)
    inner = _inner_pieces(part, mlp, prefix, names.shared_in)
    scale = None
    if moe.shared_gate:
        scale = replicated(
            part.weights,
            part.numerics.dense("out_in"),
            prefix + names.shared_gate,
            part.spec.dims.hidden_size,
            1,
            has_bias=False,
        )
    return SharedExpert(
        _load_dense(part, mlp, inner, prefix + names.shared_out, is_summed=False),
        scale,
        part.numerics.elementwise(torch.sigmoid),
    )
