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
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

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

DECODERS: tuple[str, ...] = tuple(_CONFIGS)

_ADDS_BOS = ("llama", "mistral")  # as the real families do; the others encode text alone
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


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
    fields = (
        _CONFIGS[model_type]
        | {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
        | overrides
    )
    config = AutoConfig.for_model(model_type, initializer_range=0.2, dtype=dtype, **fields)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _roughen(model)
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    save_tokenizer(path, vocab_size=config.vocab_size, adds_bos=model_type in _ADDS_BOS)
    return path


def prompts(lengths: Iterable[int], seed: int = 0) -> list[list[int]]:
    """One prompt of random byte ids for each length."""
    draw = random.Random(seed)
    return [[draw.randrange(NUM_BYTES) for _ in range(length)] for length in lengths]


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
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
