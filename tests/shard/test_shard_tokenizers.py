"""Folders whose only tokenizer is a SentencePiece model: tokenizer.json gives what SentencePiece gives.

The models are trained here, with the settings of the families that they are named after.
"""

import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, pre_tokenizers

from tgi_shard import fast_tokenizer
from tgi_shard.model_folder import ModelError

TEXTS = (
    "the quick brown fox",
    "Straße naïve 日本語 🙂",
    "  two spaces  here ",
    "a\nb\tc\n\nd",
    "",
    "don't 1234 times",
    "日",
    " 🙂🙂",
)

_BYTES = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
_LLAMA = _BYTES | {"model_type": "bpe", "vocab_size": 420, "split_digits": True, "pad_id": -1}
_T5 = {"model_type": "unigram", "unk_id": 2, "bos_id": -1, "eos_id": 1, "pad_id": 0}
_GEMMA = _LLAMA | {
    **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False},
    **{"bos_piece": "<bos>", "eos_piece": "<eos>", "pad_piece": "<pad>"},
    "user_defined_symbols": ["<start_of_turn>", "\n\n"],
}
_BAICHUAN_CONFIG = {
    "tokenizer_class": "BaichuanTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
    **{"add_bos_token": False, "add_eos_token": False},
    "bos_token": {"__type": "AddedToken", "content": "<s>", "single_word": True},
}
# Settings of the trainer; the model type; tokenizer_config.json; tokens that stand before and behind a text.
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any] | None, list[str], list[str]]] = {
    "llama": (_LLAMA, "llama", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, ["<s>"], []),
    "llama, the model alone": (_LLAMA, "llama", None, ["<s>"], []),
    "mistral without a prefix": (_LLAMA, "mistral", {"add_prefix_space": False}, ["<s>"], []),
    "gemma": (_GEMMA, "gemma", {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>"}, ["<bos>"], []),
    "gemma, the model alone": (_GEMMA, "gemma", None, ["<bos>"], []),
    "baichuan": (_LLAMA | {"add_dummy_prefix": False}, "baichuan", _BAICHUAN_CONFIG, [], []),
    "t5": (_T5 | {"vocab_size": 80}, "t5", {"tokenizer_class": "T5Tokenizer"}, [], ["</s>"]),
    "t5, the model alone": (_T5 | {"vocab_size": 80}, "t5", None, [], ["</s>"]),
    "mt5": (_T5 | {"vocab_size": 330, "byte_fallback": True}, "mt5", None, [], ["</s>"]),
}


def train(**settings: Any) -> bytes:
    return _train(json.dumps(settings))


@cache
def _train(settings: str) -> bytes:
    draw = random.Random(0)
    words = " ".join(TEXTS).split()
    letters = "abcdefghijklmnopqrstuvwxyzäß"
    lines = (
        " ".join(draw.choice(words) + "".join(draw.choices(letters, k=draw.randrange(3))) for _ in range(8))
        for _ in range(2000)
    )
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=trained, minloglevel=2, **json.loads(settings)
    )
    return trained.getvalue()


def folder_with(path: Path, model: bytes, model_type: str, config: dict[str, Any] | None) -> Path:
    name = "spiece.model" if "t5" in model_type else "tokenizer.model"
    (path / name).write_bytes(model)
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (path / "tokenization_baichuan.py").write_text("raise AssertionError('was run')")
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def converted(folder: Path) -> Tokenizer:
    fast_tokenizer.convert(folder, folder, trust_remote_code=False)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("case", CASES)
def test_ids_and_texts_are_those_of_sentencepiece(case: str, tmp_path: Path) -> None:
    settings, model_type, config, begin, end = CASES[case]
    model = train(**settings)
    tokenizer = converted(folder_with(tmp_path, model, model_type, config))
    if (config or {}).get("add_prefix_space") is False:
        without = sentencepiece_model_pb2.ModelProto.FromString(model)
        without.normalizer_spec.add_dummy_prefix = False
        model = without.SerializeToString()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = (*TEXTS, "<start_of_turn>the fox<start_of_turn>\n\nthe") if "gemma" in case else TEXTS
    for text in texts:
        ids = theirs.encode(text)
        ours = tokenizer.encode(text)
        assert ours.ids == [*map(theirs.piece_to_id, begin), *ids, *map(theirs.piece_to_id, end)], text
        assert tokenizer.decode(ours.ids) == theirs.decode(ids)


def test_sentinels_of_t5_stand_behind_its_pieces(tmp_path: Path) -> None:
    tokenizer = converted(folder_with(tmp_path, train(**_T5, vocab_size=80), "t5", None))
    assert tokenizer.token_to_id("<extra_id_0>") == 80 + 99
    assert 80 + 98 in tokenizer.encode("the <extra_id_1> fox").ids


def test_tokens_that_were_added_to_a_model(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, train(**_LLAMA), "llama", {"additional_special_tokens": ["<|end|>"]})
    (folder / "added_tokens.json").write_text(json.dumps({"<|end|>": 420, "<tool>": 421}))
    tokenizer = converted(folder)
    assert tokenizer.encode("the<|end|>fox<tool>", add_special_tokens=False).ids.count(420) == 1
    assert tokenizer.decode([421, 420], skip_special_tokens=True) == "<tool>"
    (folder / "added_tokens.json").write_text(json.dumps({"<|end|>": 430}))
    with pytest.raises(ModelError, match=r"has no place for '<\|end\|>' as 430"):
        converted(folder)


@pytest.mark.parametrize(
    ("model_type", "config", "begin"),
    [
        ("gpt_bigcode", {"bos_token": "<s>"}, []),
        ("opt", {"bos_token": "</s>", "unk_token": "</s>", "add_bos_token": True}, ["</s>"]),
    ],
)
def test_vocabulary_and_merges_of_byte_level_bpe(
    model_type: str, config: dict[str, Any], begin: list[str], tmp_path: Path
) -> None:
    merges = ["h e", "l l", "he ll", "Ġ w"]
    pieces = [
        "<s>",
        "</s>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(m.replace(" ", "") for m in merges),
    ]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"} | config
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = converted(tmp_path)
    assert tokenizer.encode("hell wo").ids == [*map(pieces.index, [*begin, "hell", "Ġw", "o"])]
    assert tokenizer.decode(tokenizer.encode("wörld 日").ids) == "wörld 日"


def test_a_model_file_that_is_none(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, b"\xff\xff not a model", "llama", {"tokenizer_class": "LlamaTokenizer"})
    with pytest.raises(ModelError, match=r"cannot be converted to tokenizer\.json"):
        converted(folder)
