"""SentencePiece's model files: what they hold, and tokenizer.json from those of its BPE kind.

A BPE model (Llama, Mistral, Gemma, Baichuan) says by itself what its pieces and merges are, whether a text
gets a prefix and whether bytes stand in for unknown characters. So no tokenizer class is asked, neither one
of transformers nor one that comes with the model. Which token begins a text and what tokens were added later
stands beside it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from tgi_shard.model_folder import ModelError, read_json_object

_BPE = 2  # of its kinds of models
_NORMAL, _USER_DEFINED, _UNUSED, _BYTE = 1, 4, 5, 6  # of its kinds of pieces; the others are special


def read(path: Path) -> Any | None:
    """The model in a file, a protobuf message. None: it is no SentencePiece model."""
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf  # slow to import

    model = import_protobuf().ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        return None
    return model if model.pieces else None


def is_bpe(model: Any) -> bool:
    return bool(model.trainer_spec.model_type == _BPE)


def has_byte_fallback(model: Any) -> bool:
    return bool(model.trainer_spec.byte_fallback)


def convert_bpe(model: Any, folder: Path) -> Tokenizer:
    """folder: where tokenizer_config.json and its like may lie. Raises ModelError."""
    from transformers.convert_slow_tokenizer import SpmConverter

    config = _json(folder / "tokenizer_config.json")
    if config.get("add_prefix_space") is False:
        model.normalizer_spec.add_dummy_prefix = False
    tokenizer = SpmConverter.build_tokenizer_from_spm_proto(
        model,
        {piece.piece: token_id for token_id, piece in enumerate(model.pieces)},
        legacy=config.get("legacy") is not False,
    )
    assert isinstance(tokenizer, Tokenizer)
    plain = (_NORMAL, _USER_DEFINED, _UNUSED, _BYTE)
    control = (piece.piece for piece in model.pieces if piece.type not in plain)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    for token_id, token in sorted(_added(config, folder).items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != token_id:
            raise ModelError(f"The tokenizer of {folder} has no place for {token.content!r} as {token_id}.")
    _add_ends(tokenizer, model.trainer_spec, config, folder)
    return tokenizer


def _added(config: dict[str, Any], folder: Path) -> dict[int, AddedToken]:
    """By id: the tokens that were added to the model's pieces, and pieces that are special though plain."""
    special_map = _json(folder / "special_tokens_map.json")
    named = [*special_map.values(), config.get("additional_special_tokens") or []]
    special = {_text(token) for token in _flat(named)}
    added = {
        token_id: AddedToken(text, normalized=False, special=text in special)
        for text, token_id in _json(folder / "added_tokens.json").items()
    }
    for token_id, fields in config.get("added_tokens_decoder", {}).items():
        added[int(token_id)] = AddedToken(**{name: fields[name] for name in fields if name != "__type"})
    return added


def _add_ends(tokenizer: Tokenizer, trainer_spec: Any, config: dict[str, Any], folder: Path) -> None:
    """The tokens that an encoded text begins and ends with: unless told otherwise it has the first alone."""
    begin = end = None
    if config.get("add_bos_token") is not False and trainer_spec.bos_id >= 0:
        begin = _text(config.get("bos_token")) or trainer_spec.bos_piece
    if config.get("add_eos_token"):
        end = _text(config.get("eos_token")) or trainer_spec.eos_piece
    ends = {text: tokenizer.token_to_id(text) for text in (begin, end) if text is not None}
    if None in ends.values():
        raise ModelError(f"The tokenizer of {folder} does not know the tokens {', '.join(ends)}.")
    if ends:
        single, pair = (
            [part for part in (begin, text, end) if part is not None] for text in ("$A:0", "$B:1")
        )
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=[*single, *pair], special_tokens=list(ends.items())
        )


def _text(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _flat(tokens: Iterable[Any]) -> Iterable[Any]:
    for token in tokens:
        if isinstance(token, list):
            yield from token
        else:
            yield token


def _json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}
