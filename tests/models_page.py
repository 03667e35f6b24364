"""docs/models.md: every family that we know, printed from its spec and from what the tests run.

Run `python tests/models_page.py` after a change of either; test_shard_models_page.py compares.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import ModuleType

import tiny_models
from tgi_shard.layers.rotary import Rope
from tgi_shard.models import registry
from tgi_shard.models.encoder_decoder.spec import EncoderDecoderSpec
from tgi_shard.models.spec import Attention, DecoderSpec

PAGE = Path(__file__).parent.parent / "docs" / "models.md"

_HEAD = """# Models

Printed by `python tests/models_page.py` from the pages in `shard/tgi_shard/models/architectures/` and from
what the tests run.

Each family is served from `.safetensors` in float32, bfloat16 or float16, on one rank or several: attention
heads and intermediate sizes must divide evenly, KV heads are repeated where there are fewer than ranks,
vocabularies are padded.

## What was tested

`make test-matrix` runs every family and variant below on one rank and on two. The oracle is `transformers` on
the same tiny random checkpoint, a whole sequence at once without a cache (for Baichuan, which it does not
ship, its Llama with the same weights). Twelve tokens are generated after the prompt in each of these ways:

| way | what happens |
|---|---|
| whole | the prompt in one step, then decodes |
| chunked | the prompt in pieces that end within blocks, beside the decodes of another sequence |
| batched | four prompts of 1 to 70 tokens in one step, then decoded together |
| preempted | after four tokens another sequence takes its blocks; it is computed anew beside two others |
| prefix-cached | two of its blocks hold what a sequence that is still being answered has computed |

At every generated token, in float32: all logits within 1e-4 of the oracle's (relative or absolute), the same
greedy token, and bit for bit the same numbers on all ranks. In bfloat16, batched: the root mean square error
of the logits against float32 on the same weights is, for the token in the middle, less than 1.5 times that of
`transformers` in bfloat16 (for Phi 3.5 MoE, whose router cuts off at a threshold, for the token at the first
quarter). On one rank also: chunks of five sizes, every logit of a prompt, steps without logits, neighbours,
float16. On four ranks: chunked, or preempted where a prompt cannot be cut.

`make test` runs a part of it: the families marked with * on one rank and two, every family and variant with a
ragged batch on one rank, and those variants that ranks share in other ways on two.

Rope scalings: linear, dynamic, llama3, yarn, longrope. Dynamic and longrope turn a token by its own
position alone, as transformers does when it decodes token by token: a prefix of one sequence can then be
shared by another.

Of models that take images too ({with_images}) the text model is served; images are not
available yet, and a prompt with one, `![](...)`, is refused.

Checkpoints in FP8 with a scale for each block of a weight, as DeepSeek V3 is published (`quant_method` `fp8`
with a `weight_block_size`), are dequantized as they are read, like MXFP4: they then take the memory of the
model's dtype.

| family (`model_type`) | traits | variants tested |
|---|---|---|
"""


_RECURRENT_HEAD = """
## Recurrent models

A sequence leaves one state of fixed size behind, however long it is. So there is no paging and no prefix to
share: a block is a whole state, `--max-total-tokens` (8192 unless it is set) bounds what a request may ask
for and costs nothing but room for token ids, and as many sequences run together as states fit into memory
(`tgi_kv_blocks_total`). Everything else is as for the decoders: prompts in chunks of any size beside decodes,
prompt logprobs, preemption, ranks that share the inner channels, the same tests against `transformers`.

| family (`model_type`) | traits | variants tested |
|---|---|---|
"""

_ENCODER_DECODER_HEAD = """
## Encoder-decoders

The prompt is the encoder's text; the answer begins with the decoder's start token, which nobody sees. An
encoder reads a prompt as a whole, so a prompt is never cut into chunks nor shared with another, and
`--max-input-tokens` is at most `--max-batch-prefill-tokens` less a token for every answer that may run beside
it, and one for the start token. Penalties are over what the decoder has said. A prompt has no logprobs:
`decoder_input_details` is refused where `--enable-prefill-logprobs` would answer it, and so are the `echo`
and `logprobs` that need them.

All are tested as above (whole, batched, preempted; what cannot be is chunked and prefix-cached), and on one
rank with answers that are taken up again in chunks, and with neighbours; one of them behind a real server,
whose shard is killed in mid-answer. T5 leaves float16's range and is refused there.

| family (`model_type`) | traits | variants tested |
|---|---|---|
"""

_FALLBACK = """
## Every other decoder of transformers

A decoder that has no row above runs by transformers' own code on our paged attention, if it lets attention be
replaced (`_supports_attention_backend`). With `--trust-remote-code` so does one that brings its code along.
Before weights are read the model runs once on the meta device, without numbers. What it asks of attention is
noted there: causal masks, sliding windows, soft-caps, sinks and scales are honoured, and any other wish is an
error. Refused too, each in a sentence: layers with another memory than keys and values (convolutions, linear
attention, state spaces), encoders, other inputs than text, rope that depends on the length of a batch
(dynamic, longrope), `--rope-scaling`, layers with different numbers of heads.

On several ranks it is cut by the plan that transformers has for it, where that asks for linears alone;
embeddings and the head stay whole on every rank. KV heads must divide evenly. A mixture of experts, or a
family without a plan, runs on one rank.

What cannot be seen beforehand: code that mixes tokens by itself, neither in attention nor through its cache.

The matrix holds these against transformers in all ways, on this path; the last ones have a row above as well.

| `model_type` | ranks | of our own too |
|---|---|---|
"""

_RECURRENT = {
    "mamba": ("Mamba", "RMSNorm, selective scan"),
    "falcon_mamba": ("Falcon-Mamba", "RMSNorm, selective scan, norms on time step, B and C"),
    "mamba2": ("Mamba 2", "RMSNorm, scan in chunks, gated norm of groups"),
}


def page() -> str:
    head = _HEAD.format(with_images=", ".join(f"`{name}`" for name in sorted(tiny_models.WITH_IMAGES)))
    decoders = "".join(_row(model_type) for model_type in sorted(tiny_models.DECODERS))
    recurrent = "".join(_recurrent_row(model_type) for model_type in sorted(tiny_models.RECURRENT))
    modules = dict.fromkeys(registry.ENCODER_DECODERS.values())
    encoder_decoders = "".join(map(_encoder_decoder_row, modules))
    fallback = "".join(map(_fallback_row, (*sorted(tiny_models.FALLBACK), *sorted(tiny_models.BOTH_WAYS))))
    return "".join(
        (
            *(head, decoders, _RECURRENT_HEAD, recurrent, _ENCODER_DECODER_HEAD, encoder_decoders),
            *(_FALLBACK, fallback),
        )
    )


def _encoder_decoder_row(module: ModuleType) -> str:
    assert module.__doc__ is not None
    title = module.__doc__.split(" (")[0].strip()
    names = ", ".join(f"`{name}`" for name in module.MODEL_TYPES)
    cases = [
        *((model_type, {}) for model_type in module.MODEL_TYPES),
        *(case for case in tiny_models.ENCODER_DECODER_VARIANTS.values() if case[0] in module.MODEL_TYPES),
    ]
    specs = (module.spec(tiny_models.config(of, **fields), None) for of, fields in cases)
    traits = ", ".join(dict.fromkeys(chain.from_iterable(map(_of_encoder_decoder, specs))))
    variants = ", ".join(
        variant.removeprefix(f"{of}-")
        for variant, (of, _) in tiny_models.ENCODER_DECODER_VARIANTS.items()
        if of in module.MODEL_TYPES
    )
    return f"| {title} ({names}) | {traits} | {variants} |\n"


def _of_encoder_decoder(spec: EncoderDecoderSpec) -> Iterator[str]:
    yield {"rms": "RMSNorm", "layer": "LayerNorm"}[spec.norm]
    if spec.norms == "of_sum":
        yield "norms of sums"
    yield "learned positions" if spec.relative is None else "relative positions"
    if spec.has_biases:
        yield "biases"
    if any(scale != 1 for scale in (spec.embedding_scale, spec.logit_scale)):
        yield "multipliers"
    yield "gated MLP" if len(spec.decoder.names.mlp_in) == 2 else "plain MLP"


def _fallback_row(model_type: str) -> str:
    ranks = "1, 2" if model_type in tiny_models.FALLBACK_ON_RANKS else "1"
    own = "yes" if model_type in tiny_models.BOTH_WAYS else ""
    return f"| `{model_type}` | {ranks} | {own} |\n"


def _row(model_type: str) -> str:
    module = registry.BY_MODEL_TYPE[model_type]
    assert module.__doc__ is not None
    title = module.__doc__.split(" (")[0].strip()
    names = ", ".join(f"`{name}`" for name in module.MODEL_TYPES)
    traits = ", ".join(_traits(model_type))
    return f"| {title} ({names}){_star(model_type)} | {traits} | {_variants(model_type)} |\n"


def _recurrent_row(model_type: str) -> str:
    family, traits = _RECURRENT[model_type]
    return f"| {family} (`{model_type}`){_star(model_type)} | {traits} | {_variants(model_type)} |\n"


def _star(model_type: str) -> str:
    return "*" if model_type in tiny_models.REPRESENTATIVES else ""


def _variants(model_type: str) -> str:
    return ", ".join(
        variant.removeprefix(f"{model_type}-")
        for variant, (of, _) in tiny_models.VARIANTS.items()
        if of == model_type
    )


def _traits(model_type: str) -> list[str]:
    """Of the tiny config and its variants: what only some checkpoints of a family have is named too."""
    settings = [{}, *(fields for of, fields in tiny_models.VARIANTS.values() if of == model_type)]
    module = registry.BY_MODEL_TYPE[model_type]
    specs = (module.spec(tiny_models.config(model_type, **fields), None) for fields in settings)
    return list(dict.fromkeys(chain.from_iterable(map(_of, specs))))


def _of(spec: DecoderSpec) -> Iterator[str]:
    dims = spec.dims
    yield {"rms": "RMSNorm", "layer": "LayerNorm"}[spec.norm.kind]
    if spec.norms != "before":
        yield {"after": "norms after", "around": "norms around", "of_sum": "norms of sums"}[spec.norms]
    if spec.residual != "sequential":
        yield {"parallel": "parallel with two norms", "parallel_one_norm": "parallel with one norm"}[
            spec.residual
        ]
    yield from _of_attention(spec.attention, dims.num_layers)
    if spec.attention.latents is not None:
        yield "latent attention (the cache holds latents)"
        if spec.attention.latents.query_rank is not None:
            yield "narrow queries"
    elif dims.num_kv_heads == 1:
        yield "multi-query"
    elif dims.num_kv_heads < dims.num_heads:
        yield "grouped queries"
    if spec.names.position_embedding is not None:
        yield "learned positions"
    if spec.names.embedding_norm is not None:
        yield "embedding norm"
    if spec.names.project_in is not None:
        yield "projected embedding"
    if any(scale != 1 for scale in (spec.embedding_scale, spec.residual_scale, spec.logit_scale)):
        yield "multipliers"
    if spec.logit_softcap is not None:
        yield "logit soft-cap"
    if spec.head_bias:
        yield "head bias"
    if spec.has_unit_head:
        yield "normalised head"
    if spec.moe is not None:
        yield f"experts ({type(spec.moe.routing).__name__})"
        if spec.names.experts is not None and spec.names.experts.is_mxfp4:
            yield "experts in MXFP4, dequantized as they are read"
        if spec.moe.shared_size is not None:
            yield "shared expert"
        if not all(spec.moe.layers):
            yield "some layers dense"
    else:
        yield "gated MLP" if spec.mlp.is_gated else "plain MLP"


def _of_attention(attention: Attention, num_layers: int) -> Iterator[str]:
    ropes = attention.layer_ropes or (attention.rope,) * num_layers
    rotated = list(dict.fromkeys(rope for rope in ropes if rope is not None))
    for rope in rotated:
        yield from _of_rope(rope)
    if rotated and None in ropes:
        yield "layers that do not rotate"
    if len(rotated) > 1:
        yield "two ropes"
    if attention.qk_norm is not None:
        yield {
            "per_head": "QK-norm",
            "each_head": "QK-norm of each head's own",
            "all_heads": "QK-norm over all heads",
        }[attention.qk_norm]
    if attention.windows is not None and any(attention.windows):
        yield "sliding window" if all(attention.windows) else "window in some layers"
    if attention.stretches is not None and any(attention.stretches):
        yield "chunked attention" if all(attention.stretches) else "chunked attention in some layers"
    if attention.normalises_rotated:
        yield "QK-norm after the rotation"
    if attention.unrotated_temperature is not None:
        yield "temperature by position"
    if attention.softcap is not None:
        yield "attention soft-cap"
    if attention.alibi is not None:
        yield "ALiBi"
    if attention.clip_qkv is not None:
        yield "clamped QKV"
    if attention.has_sinks:
        yield "attention sinks"
    if attention.qkv_bias:
        yield "QKV biases"


def _of_rope(rope: Rope) -> Iterator[str]:
    yield ("partial " if rope.rotary_dim else "") + ("interleaved " if rope.is_interleaved else "") + "rotary"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
