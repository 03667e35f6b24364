"""A model of a well-known shape with random weights, for measuring speed without the real weights.

    python bench/make_model.py qwen2.5-0.5b /tmp/bench-model

The numbers are noise, the work is the same. Two things make it fit for measuring:
- It never ends by itself: neither config, generation config nor tokenizer names an end-of-sequence token, so
  that every server generates exactly as many tokens as it is asked for, also through routes that cannot
  ignore such a token (TGI's).
- Its tokenizer has one token for each "word" (a space and up to four letters), and nearly every token is such
  a word: so prompts of exactly n tokens are easily made, and every generated token can be streamed the moment
  it is there.
"""

import argparse
import itertools
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

_QWEN2 = {"model_type": "qwen2", "tie_word_embeddings": True, "max_position_embeddings": 32768}
_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "head_dim": 128, "max_position_embeddings": 131072}

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _QWEN2
    | {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
    },
    "qwen2.5-1.5b": _QWEN2
    | {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
    },
    "llama-3.2-1b": _LLAMA3
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": _LLAMA3
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
    },
    "tiny": _QWEN2  # for trying things out
    | {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 1000,
    },
}

_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    make(arguments.shape, arguments.folder, getattr(torch, arguments.dtype))


def make(shape: str, folder: Path, dtype: torch.dtype) -> None:
    """Write config, weights, tokenizer and generation config. The same arguments give the same weights."""
    fields = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(
        **fields, bos_token_id=None, eos_token_id=None, pad_token_id=None, dtype=dtype
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.generation_config = GenerationConfig(do_sample=False)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    save_tokenizer(folder, fields["vocab_size"], fields["max_position_embeddings"])
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{shape}: {num_parameters / 1e6:.0f}M parameters in {folder}")


def save_tokenizer(folder: Path, vocab_size: int, max_length: int) -> None:
    """A byte-level BPE: the 256 bytes, then words of a space and one to four letters, one token each.

    Every word is merged letter by letter from its beginning, so each beginning of a word is a token, too.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = list(itertools.islice(_words(), vocab_size - len(alphabet)))
    vocab = {token: i for i, token in enumerate([*alphabet, *words])}
    assert len(vocab) == vocab_size
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(word[:-1], word[-1]) for word in words]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2))


def _words() -> Iterator[str]:
    """The shorter ones first, so that the beginning of each is there before it."""
    for length in range(1, 5):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            yield "Ġ" + "".join(letters)


if __name__ == "__main__":
    main()
