"""What the checkpoints call our parts: a table for each naming habit, "{layer}" in place of the number.

`prefix` is what the names of a whole language model start with; exports of the bare decoder leave it away.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Experts:
    """`{expert}` in place of the number."""

    router: str
    mlp_in: tuple[str, ...]  # of one expert: gate and up, or both in one
    mlp_out: str
    # Checkpoints that stack all experts: our tensor of one expert -> the tensor in which it is a part.
    stacked: tuple[tuple[str, str], ...] = ()
    # The weights of `mlp_in` and `mlp_out` are in two tensors each, <module>.blocks and <module>.scales.
    is_mxfp4: bool = False
    shared_in: tuple[str, ...] = ()
    shared_out: str = ""
    shared_gate: str = ""
    correction: str | None = None  # a tensor: see layers/moe.GroupedTopK


@dataclass(frozen=True, slots=True)
class Latents:
    """In place of `qkv`: modules that lead to narrow vectors, their norms, modules that lead on."""

    query_down: str | None  # None: `query_up` reads the hidden states
    query_norm: str | None
    query_up: str
    kv_down: str  # the latent, then the key features that turn
    kv_norm: str
    kv_up: str  # of each head, its key features and then its values


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
    latents: Latents | None = None


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

_LATENTS = Latents(
    query_down="self_attn.q_a_proj",
    query_norm="self_attn.q_a_layernorm",
    query_up="self_attn.q_b_proj",
    kv_down="self_attn.kv_a_proj_with_mqa",
    kv_norm="self_attn.kv_a_layernorm",
    kv_up="self_attn.kv_b_proj",
)

DEEPSEEK = replace(
    LLAMA,
    qkv=(),
    latents=_LATENTS,
    experts=Experts(
        router="mlp.gate",
        mlp_in=("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj"),
        mlp_out="mlp.experts.{expert}.down_proj",
        shared_in=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        shared_out="mlp.shared_experts.down_proj",
    ),
)
# Without a narrow vector for the queries.
DEEPSEEK_LITE = replace(
    DEEPSEEK, latents=replace(_LATENTS, query_down=None, query_norm=None, query_up="self_attn.q_proj")
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
