"""Tiny random checkpoints in the Hub's layout, one for each decoder: what the tests serve and compare.

transformers makes them, so that it can also be the oracle. Sizes are awkward on purpose: a head_dim that is
not hidden / heads, vocabularies that do not divide by two, biases and norm weights off their neutral values.
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    FineGrainedFP8Config,
    GenerationConfig,
    Mxfp4Config,
    PreTrainedConfig,
    PreTrainedModel,
)

import baichuan_oracle

BOS_ID, EOS_ID, PAD_ID = 256, 257, 258  # the 256 bytes come before them, a few two-letter tokens after them
NUM_BYTES = 256

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 112,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _COMMON
    | {"vocab_size": 259, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "mistral": _COMMON | {"vocab_size": 264, "head_dim": 24, "sliding_window": 20},
    "qwen2": _COMMON | {"vocab_size": 272, "tie_word_embeddings": True, "num_hidden_layers": 3},
    "qwen3": _COMMON | {"vocab_size": 261, "head_dim": 32, "tie_word_embeddings": True},
    "gpt2": {
        "vocab_size": 263,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 512,
        "activation_function": "gelu_new",
    },
}

ROPE = {"rope_theta": 5000.0}
_MOE = {"num_local_experts": 6, "num_experts_per_tok": 2}
_DEEPSEEK: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": 28,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 12,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
}
_GPT = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512}

_CONFIGS |= {
    "gemma": _COMMON | {"vocab_size": 265, "head_dim": 20, "num_key_value_heads": 1},
    "gemma2": _COMMON
    | {
        "vocab_size": 265,
        "head_dim": 24,
        "query_pre_attn_scalar": 30,
        "sliding_window": 20,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 4.0,
        "num_hidden_layers": 3,
    },
    "gemma3_text": _COMMON
    | {
        "vocab_size": 265,
        "head_dim": 24,
        "query_pre_attn_scalar": 30,
        "sliding_window": 20,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "phi": _COMMON | {"vocab_size": 259},
    "phi3": _COMMON | {"vocab_size": 266},
    "stablelm": _COMMON | {"vocab_size": 260, "use_qkv_bias": True},
    "olmo": _COMMON | {"vocab_size": 264, "clip_qkv": 1.5},
    "olmo2": _COMMON | {"vocab_size": 264},
    "olmo3": _COMMON
    | {
        "vocab_size": 264,
        "num_hidden_layers": 3,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "granite": _COMMON
    | {
        "vocab_size": 263,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.5,
    },
    "cohere": _COMMON | {"vocab_size": 262, "tie_word_embeddings": True, "logit_scale": 0.4},
    "cohere2": _COMMON
    | {
        "vocab_size": 262,
        "tie_word_embeddings": True,
        "logit_scale": 0.4,
        "sliding_window": 20,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "starcoder2": _COMMON | {"vocab_size": 261, "sliding_window": 24, "tie_word_embeddings": True},
    "smollm3": _COMMON | {"vocab_size": 261, "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]},
    "glm": _COMMON | {"vocab_size": 267, "head_dim": 24, "attention_bias": True},
    "glm4": _COMMON | {"vocab_size": 267, "head_dim": 24, "attention_bias": True},
    "exaone4": _COMMON
    | {
        "vocab_size": 268,
        "num_hidden_layers": 3,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "gpt_neox": _COMMON | {"vocab_size": 269, "num_key_value_heads": 4},
    "gptj": _GPT | {"vocab_size": 269, "rotary_dim": 8, "tie_word_embeddings": False},
    "gpt_neo": {
        "vocab_size": 269,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 20,
        "max_position_embeddings": 512,
    },
    "gpt_bigcode": _GPT | {"vocab_size": 270},
    "opt": _COMMON
    | {
        "vocab_size": 271,
        "num_key_value_heads": 4,
        "ffn_dim": 112,
        "word_embed_proj_dim": 64,
        "tie_word_embeddings": True,
    },
    "baichuan": {
        "vocab_size": 266,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 112,
        "max_position_embeddings": 512,
    },
    "bloom": {"vocab_size": 271, "hidden_size": 64, "n_head": 4, "n_layer": 2, "tie_word_embeddings": False},
    "falcon": _COMMON | {"vocab_size": 271, "tie_word_embeddings": True},
    "mpt": {
        "vocab_size": 264,
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "attn_config": {"clip_qkv": 1.5},
    },
    "mixtral": _COMMON | _MOE | {"vocab_size": 260, "sliding_window": 20},
    "qwen2_moe": _COMMON
    | {
        "vocab_size": 272,
        "num_hidden_layers": 3,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": _COMMON
    | {
        "vocab_size": 261,
        "head_dim": 32,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "phimoe": _COMMON
    | _MOE
    | {"vocab_size": 266, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.2},
    "olmoe": _COMMON
    | {"vocab_size": 264, "num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 24},
    "gpt_oss": _COMMON
    | _MOE
    | {"vocab_size": 269, "head_dim": 24, "sliding_window": 20, "swiglu_limit": 0.8, "rope_parameters": ROPE},
    "granitemoe": _COMMON | _MOE | {"vocab_size": 263, "attention_multiplier": 0.2, "logits_scaling": 2.5},
    "deepseek_v2": _COMMON
    | _DEEPSEEK
    | {
        "vocab_size": 265,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 2.0,
        "rope_parameters": ROPE,
    },
    "deepseek_v3": _COMMON | _DEEPSEEK | {"vocab_size": 266, "rope_parameters": ROPE},
    "llama4_text": _COMMON
    | {
        "vocab_size": 262,
        "head_dim": 20,
        "num_hidden_layers": 4,
        "intermediate_size": 40,
        "intermediate_size_mlp": 112,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 3,
        "attention_chunk_size": 20,
        "floor_scale": 8,
        "attn_scale": 0.3,
    },
    "dbrx": {
        "vocab_size": 272,
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 10000.0},
        "ffn_config": {
            "ffn_hidden_size": 48,
            "moe_num_experts": 6,
            "moe_top_k": 3,
            "ffn_act_fn": {"name": "silu"},
        },
        "tie_word_embeddings": False,
    },
}

_T5 = {
    "d_model": 48,
    "d_kv": 20,
    "d_ff": 80,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 40,
    "decoder_start_token_id": PAD_ID,
}
_ENCODER_DECODER_CONFIGS: dict[str, dict[str, Any]] = {
    "t5": _T5 | {"vocab_size": 263},
    "mt5": _T5 | {"vocab_size": 270},
    "bart": {
        "vocab_size": 263,
        "d_model": 48,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 80,
        "decoder_ffn_dim": 72,
        "max_position_embeddings": 256,
        "init_std": 0.1,
        "decoder_start_token_id": PAD_ID,
        "forced_eos_token_id": None,
    },
}

DECODERS: tuple[str, ...] = tuple(_CONFIGS)
ENCODER_DECODERS: tuple[str, ...] = tuple(_ENCODER_DECODER_CONFIGS)
# Other settings: name -> (model_type, fields of its config).
ENCODER_DECODER_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5-gated": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart-scaled": ("bart", {"scale_embedding": True, "activation_function": "relu"}),
}

_MAMBA = {"hidden_size": 48, "state_size": 12, "num_hidden_layers": 3, "time_step_rank": 7}
_CONFIGS |= {
    "mamba": _MAMBA | {"vocab_size": 263, "tie_word_embeddings": False},
    "falcon_mamba": _MAMBA | {"vocab_size": 265, "expand": 3, "conv_kernel": 3},
}
_CONFIGS["mamba2"] = {
    "vocab_size": 267,
    "hidden_size": 48,
    "num_heads": 8,
    "head_dim": 12,
    "n_groups": 4,
    "state_size": 10,
    "num_hidden_layers": 3,
    "chunk_size": 16,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# Models that take images too: the family of their text model, and what else is in their config.
WITH_IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"vision_config": _VISION}),
    "llama4": (
        "llama4_text",
        {
            "vision_config": _VISION
            | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        },
    ),
    "mistral3": (
        "mistral",
        {"vision_config": _VISION | {"model_type": "pixtral", "head_dim": 16}, "tie_word_embeddings": False},
    ),
}
RECURRENT = ("mamba", "falcon_mamba", "mamba2")
FAMILIES = DECODERS + RECURRENT

_ROTARY = {"rope_parameters": ROPE | {"rope_type": "default"}}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "num_hidden_layers": 3}
# Families that have no page of ours and run through transformers.
FALLBACK: dict[str, dict[str, Any]] = {
    "apertus": _COMMON | _ROTARY | {"vocab_size": 263},
    "arcee": _COMMON | {"vocab_size": 263, "head_dim": 16},
    "bitnet": _COMMON | {"vocab_size": 263},
    "cwm": _COMMON
    | _ROTARY
    | {"vocab_size": 263, "sliding_window": 20, "num_hidden_layers": 3}
    | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "diffllama": _COMMON | {"vocab_size": 263},
    "ernie4_5": _COMMON | {"vocab_size": 263, "head_dim": 24, "tie_word_embeddings": True},
    "exaone": _COMMON | {"vocab_size": 263},
    "helium": _COMMON | {"vocab_size": 263, "head_dim": 16},
    "hunyuan_v1_dense": _COMMON | {"vocab_size": 263, "head_dim": 16},
    "jais2": _COMMON | {"vocab_size": 263, "head_dim": 16},
    "nanochat": _COMMON | {"vocab_size": 263},
    "nemotron": _COMMON | {"vocab_size": 263, "head_dim": 16},
    "persimmon": _COMMON | {"vocab_size": 263, "num_key_value_heads": 4},
    "seed_oss": _COMMON | {"vocab_size": 263, "head_dim": 24},
    "vaultgemma": _COMMON
    | {"vocab_size": 263, "head_dim": 24, "sliding_window": 20, "attn_logit_softcapping": 5.0},
    "dots1": _COMMON
    | _EXPERTS
    | {"vocab_size": 263, "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1}
    | {"sliding_window": None},
    "ernie4_5_moe": _COMMON
    | _EXPERTS
    | {"vocab_size": 263, "moe_num_experts": 6, "moe_k": 2, "moe_layer_start_index": 1},
}
# Of those, the ones that the tests put on two ranks.
FALLBACK_ON_RANKS = (
    *("apertus", "arcee", "cwm", "ernie4_5", "exaone", "helium", "jais2", "nanochat", "nemotron"),
    *("seed_oss", "vaultgemma", "llama", "mistral", "gemma2", "cohere2", "gptj"),
)
# Those with a page that take the tests on that path too.
BOTH_WAYS = ("llama", "mistral", "gemma2", "cohere2", "gpt_oss", "qwen2_moe", "gptj")

# Every family takes a short test; these, which have most traits between them, all the others too. `make
# test-matrix` puts every family to every test.
REPRESENTATIVES = (
    *("mamba", "falcon_mamba", "mamba2"),
    *("llama", "mistral", "gemma2", "gemma3_text", "phi", "cohere2", "olmo2"),
    *("gpt_neox", "gptj", "falcon", "bloom", "opt", "qwen2_moe", "gpt_oss", "deepseek_v3"),
    "llama4_text",
)

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 30,
}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8]}
# Other settings of a family: name -> (model_type, fields of its config).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba-tied-biases": ("mamba", {"tie_word_embeddings": True, "use_bias": True, "use_conv_bias": False}),
    "mamba2-one-group": ("mamba2", {"n_groups": 1, "use_bias": True, "tie_word_embeddings": True}),
    "falcon_mamba-half-residual": ("falcon_mamba", {"residual_in_fp32": False, "hidden_act": "gelu"}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-no-gqa": ("llama", {"num_key_value_heads": 4}),
    "llama-odd-head-dim": ("llama", {"head_dim": 10, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-linear": ("llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.5}}),
    "llama-llama3": (
        "llama",
        {"rope_parameters": ROPE | LLAMA3 | {"original_max_position_embeddings": 64}},
    ),
    "llama-yarn": ("llama", {"rope_parameters": ROPE | YARN}),
    "llama-yarn-mscale": (
        "llama",
        {"rope_parameters": ROPE | YARN | {"mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False}},
    ),
    "llama-yarn-factors": (
        "llama",
        {"rope_parameters": ROPE | YARN | {"attention_factor": 1.3, "beta_fast": 8, "beta_slow": 2}},
    ),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "mistral-window-of-one": ("mistral", {"sliding_window": 1}),
    "mistral-window-of-a-block": ("mistral", {"sliding_window": 16}),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 18, "max_window_layers": 1},
    ),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3-biases": ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    "gpt2-scales": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "n_inner": 96}),
    "gpt2-unscaled": ("gpt2", {"scale_attn_weights": False, "activation_function": "relu"}),
    "llama-dynamic": ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}),
    "mixtral-no-window": ("mixtral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2_moe-windows": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 18, "norm_topk_prob": True, "qkv_bias": False},
    ),
    "qwen3_moe-every-other": ("qwen3_moe", {"decoder_sparse_step": 2, "norm_topk_prob": False}),
    "gemma-tied": ("gemma", {"tie_word_embeddings": True}),
    "gemma2-no-caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3_text-linear": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_theta": 9e4, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 1e3, "rope_type": "default"},
            }
        },
    ),
    "phi-qk-norm": ("phi", {"qk_layernorm": True, "num_key_value_heads": 4}),
    "phi3-window-partial": (
        "phi3",
        {
            "sliding_window": 20,
            "rope_parameters": ROPE | {"rope_type": "default", "partial_rotary_factor": 0.5},
        },
    ),
    "phi3-longrope": (
        "phi3",
        {
            "rope_parameters": ROPE | LONGROPE | {"original_max_position_embeddings": 128},
            "original_max_position_embeddings": 128,
        },
    ),
    "phimoe-biasless": ("phimoe", {"attention_bias": False, "lm_head_bias": False, "sliding_window": 20}),
    "cohere-qk-norm": ("cohere", {"use_qk_norm": True, "attention_bias": True}),
    "cohere2-all-full": ("cohere2", {"layer_types": ["full_attention"] * 3}),
    "starcoder2-no-bias": ("starcoder2", {"use_bias": False, "sliding_window": None}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "olmo-no-clip": ("olmo", {"clip_qkv": None, "tie_word_embeddings": True}),
    "olmo2-one-kv-head": ("olmo2", {"num_key_value_heads": 1}),
    "olmo3-yarn": (
        "olmo3",
        {
            "rope_parameters": {
                "full_attention": ROPE | YARN,
                "sliding_attention": ROPE | {"rope_type": "default"},
            }
        },
    ),
    "olmoe-clip": ("olmoe", {"clip_qkv": 1.0, "norm_topk_prob": True}),
    "gpt_oss-yarn": ("gpt_oss", {"rope_parameters": ROPE | YARN | {"truncate": False}}),
    "gpt_oss-mxfp4": ("gpt_oss", {"intermediate_size": 96, "quantization_config": {"quant_method": "mxfp4"}}),
    "granite-biases": ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "granitemoe-biases": ("granitemoe", {"attention_bias": True, "residual_multiplier": 0.5}),
    "smollm3-windows": ("smollm3", {"use_sliding_window": True, "sliding_window": 20}),
    "glm4-no-bias": ("glm4", {"attention_bias": False}),
    "exaone4-no-window": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "gpt_neox-sequential": (
        "gpt_neox",
        {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
    ),
    "gptj-whole-head": ("gptj", {"rotary_dim": 16, "n_inner": 96}),
    "gpt_bigcode-many-kv-heads": ("gpt_bigcode", {"multi_query": False, "scale_attn_weights": False}),
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "opt-no-bias": ("opt", {"enable_bias": False, "activation_function": "gelu"}),
    "baichuan-2": ("baichuan", {"z_loss_weight": 0}),
    "baichuan-13b": ("baichuan", {"max_position_embeddings": None, "model_max_length": 512}),
    "baichuan-2-13b-six-heads": (
        "baichuan",
        {
            "max_position_embeddings": None,
            "z_loss_weight": 0,
            "num_attention_heads": 6,
            "hidden_size": 48,
        },
    ),
    "bloom-six-heads": ("bloom", {"n_head": 6, "hidden_size": 48, "tie_word_embeddings": True}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "bias": True},
    ),
    "falcon-rw": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "mpt-six-heads": (
        "mpt",
        {"n_heads": 6, "d_model": 48, "attn_config": {"softmax_scale": 0.4}},
    ),
    "deepseek_v2-lite": (
        "deepseek_v2",
        {
            "q_lora_rank": None,
            "topk_method": "greedy",
            "rope_parameters": ROPE | YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
        },
    ),
    "deepseek_v2-biases": ("deepseek_v2", {"attention_bias": True, "tie_word_embeddings": True}),
    "deepseek_v3-halves": ("deepseek_v3", {"rope_interleave": False, "norm_topk_prob": False}),
    "deepseek_v3-yarn": (
        "deepseek_v3",
        {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": ROPE | YARN | {"mscale": 1.0, "mscale_all_dim": 1.3},
        },
    ),
    "deepseek_v3-fp8": (
        "deepseek_v3",
        {"q_lora_rank": 32, "kv_lora_rank": 24, "quantization_config": FP8},
    ),
    "qwen3-fp8": ("qwen3", {"quantization_config": FP8}),
    "llama4_text-two-experts": (
        "llama4_text",
        {
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 1,
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "attention_chunk_size": 16,
            "rope_parameters": ROPE | LLAMA3 | {"original_max_position_embeddings": 64},
        },
    ),
    "llama4_text-no-chunks": ("llama4_text", {"attention_chunk_size": None, "no_rope_layers": [1, 0, 0, 1]}),
    "dbrx-plain-weights": (
        "dbrx",
        {
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 0.7, "rope_theta": 500.0},
            "ffn_config": {
                "ffn_hidden_size": 48,
                "moe_num_experts": 6,
                "moe_top_k": 2,
                "moe_normalize_expert_weights": None,
                "ffn_act_fn": {"name": "silu"},
            },
        },
    ),
}


_ADDS_BOS = ("llama", "mistral")  # as the real families do; the others encode text alone
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    return _config(model_type, torch.float32, overrides)


def _config(model_type: str, dtype: torch.dtype, overrides: dict[str, Any]) -> PreTrainedConfig:
    if model_type in ENCODER_DECODERS:
        return AutoConfig.for_model(
            model_type,
            dtype=dtype,
            **_ENCODER_DECODER_CONFIGS[model_type]
            | {"eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
            | overrides,
        )
    if model_type in WITH_IMAGES:
        text, fields = WITH_IMAGES[model_type]
        described = _config(text, dtype, overrides).to_dict()
        return AutoConfig.for_model(model_type, dtype=dtype, text_config=described, **fields)
    spread = "init_std" if model_type == "opt" else "initializer_range"
    special = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    fields = {spread: 0.2} | (_CONFIGS | FALLBACK)[model_type] | special | overrides
    return AutoConfig.for_model(model_type, dtype=dtype, **fields)


def save(
    model_type: str,
    path: Path,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write config, random weights, tokenizer and generation config to `path`, made if missing; returns it.

    overrides: fields of the Hugging Face config in place of this file's. Equal arguments give equal bytes.
    """
    quantization = overrides.pop("quantization_config", None)
    config = _config(model_type, dtype, overrides)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        is_baichuan = model_type == "baichuan"
        if is_baichuan:
            model = baichuan_oracle.new(config)
        else:
            model = _auto(config).from_config(config, dtype=torch.float32)
        _roughen(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():  # Llama 4's images have complex ones
            tensor.data = tensor.data.to(dtype)
    described = GenerationConfig(
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        decoder_start_token_id=PAD_ID if config.is_encoder_decoder else None,
    )
    if is_baichuan:
        baichuan_oracle.save(model, config, path)
        described.save_pretrained(path)
    else:
        model.generation_config = described
        model.save_pretrained(path, max_shard_size=max_shard_size)
    if quantization is not None:
        _PACK[quantization["quant_method"]](path, seed, quantization)
    save_tokenizer(path, vocab_size=config.get_text_config().vocab_size, adds_bos=model_type in _ADDS_BOS)
    return path


def _auto(config: PreTrainedConfig) -> Any:
    if config.model_type in WITH_IMAGES:
        return AutoModelForImageTextToText
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def oracle(checkpoint: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' model. Its fused attention leaves soft-caps and sinks out: those take the plain one."""
    config = AutoConfig.from_pretrained(checkpoint)
    model_type = config.model_type
    if model_type == "baichuan":
        return baichuan_oracle.load(checkpoint, dtype)
    is_plain = model_type in ("gemma2", "gemma3", "gemma3_text", "gpt_oss", "vaultgemma")
    quantization = json.loads((checkpoint / "config.json").read_text()).get("quantization_config")
    dequantize: dict[str, Any] = {}
    if quantization is not None:
        how = Mxfp4Config if quantization["quant_method"] == "mxfp4" else FineGrainedFP8Config
        dequantize = {"quantization_config": how(dequantize=True)}
    model = _auto(config).from_pretrained(
        checkpoint,
        dtype=dtype,
        attn_implementation="eager" if is_plain else None,
        **dequantize,
    )
    # Without an image its own forward fails in transformers 5.24: it asks its text model for image outputs.
    return model.language_model if model_type == "llama4" else model


def _pack_mxfp4(path: Path, seed: int, quantization: dict[str, Any]) -> None:
    """Random MXFP4 blocks and scales in place of the experts' weights, as gpt-oss is published."""
    draw = torch.Generator().manual_seed(seed)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, in_features, out_features = tensors.pop(name).shape
        shape = (num_experts, out_features, in_features // 32)
        tensors |= {
            f"{name}_blocks": torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=draw),
            f"{name}_scales": torch.randint(120, 126, shape, dtype=torch.uint8, generator=draw),
        }
    _save_packed(path, tensors, quantization)


def _pack_fp8(path: Path, seed: int, quantization: dict[str, Any]) -> None:
    """The linears of the layers in FP8 with a random scale for each block, as DeepSeek V3 is published."""
    draw = torch.Generator().manual_seed(seed)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight") or "_proj_with" in name]:
        grid = [
            -(-size // of_block)
            for size, of_block in zip(tensors[name].shape, quantization["weight_block_size"], strict=True)
        ]
        tensors[name] = (tensors[name].float() * 100).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(grid, generator=draw) * 0.015 + 0.005
    _save_packed(path, tensors, quantization)


_PACK = {"mxfp4": _pack_mxfp4, "fp8": _pack_fp8}


def _save_packed(path: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> None:
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(described | {"quantization_config": quantization}))


def prompts(lengths: Iterable[int], seed: int = 0) -> list[list[int]]:
    """One prompt of random byte ids for each length."""
    draw = random.Random(seed)
    return [[draw.randrange(NUM_BYTES) for _ in range(length)] for length in lengths]


def never_ends(path: Path) -> None:
    """Take the end-of-sequence token out of a checkpoint's configs: answers run to their length."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        fields = json.loads((path / name).read_text())
        (path / name).write_text(
            json.dumps({k: v for k, v in fields.items() if not k.startswith("eos_token")})
        )


def save_tokenizer(path: Path, *, vocab_size: int, adds_bos: bool) -> None:
    """A byte-level BPE of exactly `vocab_size` ids: bytes, three special tokens, pairs of letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == NUM_BYTES
    assert vocab_size > PAD_ID
    vocab = {char: i for i, char in enumerate(alphabet)}
    special = {"<s>": BOS_ID, "</s>": EOS_ID, "<pad>": PAD_ID}
    letters = "etaoinshrdlu"
    pairs = [(a, b) for a in letters for b in letters][: vocab_size - PAD_ID - 1]
    assert PAD_ID + 1 + len(pairs) == vocab_size, "more ids than pairs of letters"
    vocab |= special | {a + b: PAD_ID + 1 + i for i, (a, b) in enumerate(pairs)}

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
        )
    tokenizer.save(str(path / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(described, indent=2))


def _roughen(model: torch.nn.Module) -> None:
    """Move biases and norm weights off 0 and 1, where transformers starts them: a part left out must show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if "relative_attention_bias" in name:
                parameter.add_(torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.2)
