"""What the checkpoints call our parts: a table for each naming habit, "{layer}" in place of the number.

`prefix` is what the names of a whole language model start with; exports of the bare decoder leave it away.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Experts:
    """`{expert}` in place of the number."""

    router: str
    mlp_in: tuple[str, ...]  # of one expert: gate and up, or both in one
    mlp_out: str
    # Checkpoints that stack all experts: our tensor of one expert -> the tensor in which it is a part.
    stacked: tuple[tuple[str, str], ...] = ()
    shared_in: tuple[str, ...] = ()
    shared_out: str = ""
    shared_gate: str = ""


@dataclass(frozen=True, slots=True)
class Names:
    """Our part -> the checkpoint's module. Weights and biases are `<module>.weight` and `<module>.bias`.

    A part that a family does not have is None.
    """

    prefix: str
    embedding: str
    head: str  # stands outside the prefix
    final_norm: str | None
    layer: str  # what the names of a layer's parts start with
    qkv: tuple[str, ...]  # three modules, or one with all three along its output features
    attention_out: str
    mlp_in: tuple[str, ...]  # gate and up, or both in one, or the one of a plain MLP
    mlp_out: str
    attention_norm: str | None = None  # before attention, or after the sum with its output
    mlp_norm: str | None = None
    post_attention_norm: str | None = None  # on attention's output
    post_mlp_norm: str | None = None
    position_embedding: str | None = None
    embedding_norm: str | None = None
    project_in: str | None = None  # from the embedding's size to the hidden size
    project_out: str | None = None
    query_norm: str | None = None  # with "{head}" if every head has a module of its own
    key_norm: str | None = None
    sinks: str | None = None  # a tensor, not a module
    experts: Experts | None = None


LLAMA = Names(
    prefix="model.",
    embedding="embed_tokens",
    head="lm_head",
    final_norm="norm",
    layer="layers.{layer}.",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.o_proj",
    mlp_in=("mlp.gate_proj", "mlp.up_proj"),
    mlp_out="mlp.down_proj",
)

GPT2 = Names(
    prefix="transformer.",
    embedding="wte",
    position_embedding="wpe",
    head="lm_head",
    final_norm="ln_f",
    layer="h.{layer}.",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    qkv=("attn.c_attn",),
    attention_out="attn.c_proj",
    mlp_in=("mlp.c_fc",),
    mlp_out="mlp.c_proj",
)
