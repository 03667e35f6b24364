"""tokenizer.json, the one tokenizer format that the router reads: made once for models with an older one."""

import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgi_shard.model_folder import ModelError, read_json_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

FILE_NAME = "tokenizer.json"

_VOCABULARIES = ("*.model", "*.tiktoken", "vocab.json", "vocab.txt")


def is_missing(folder: Path) -> bool:
    return not (folder / FILE_NAME).is_file()


def convert(source: Path, folder: Path, *, trust_remote_code: bool) -> None:
    """Write `folder`/tokenizer.json from the tokenizer files of `source`.

    Raises ModelError when there is no tokenizer, or one that has no equivalent in that format.
    """
    from tgi_shard import sentencepiece_model  # most models never come here

    vocabularies = sorted(path for pattern in _VOCABULARIES for path in source.glob(pattern))
    if not vocabularies:
        raise ModelError(f"There is no tokenizer in {source}: neither tokenizer.json nor an older format.")
    logger.info("There is no tokenizer.json in %s. Converting %s.", source, vocabularies[0].name)
    models = [path for path in vocabularies if path.suffix == ".model"]
    if models and importlib.util.find_spec("sentencepiece") is None:
        # Without the library transformers takes the file for another format and reports the wrong thing as
        # missing.
        raise ModelError(
            f"{models[0]} is a SentencePiece tokenizer; converting it to tokenizer.json needs "
            "`pip install sentencepiece`."
        )
    model = sentencepiece_model.read(models[0]) if models else None
    if model is not None and sentencepiece_model.is_bpe(model):
        tokenizer = sentencepiece_model.convert_bpe(model, source)
    else:
        tokenizer = _through_transformers(source, trust_remote_code)
        if model is not None and sentencepiece_model.has_byte_fallback(model):
            tokenizer = _with_byte_fallback(tokenizer)
    partial = folder / f".{FILE_NAME}.{os.getpid()}.partial"
    try:
        tokenizer.save(str(partial))
        partial.replace(folder / FILE_NAME)
    finally:
        partial.unlink(missing_ok=True)


def _through_transformers(source: Path, trust_remote_code: bool) -> "Tokenizer":
    from transformers import AutoTokenizer, GPT2Tokenizer  # slow to import

    described = source / "tokenizer_config.json"
    named = read_json_object(described).get("tokenizer_class") if described.is_file() else None
    is_gpt2 = named in ("GPT2Tokenizer", "GPT2TokenizerFast") and (source / "merges.txt").is_file()
    # For some of the families that use it (GPT-BigCode) AutoTokenizer knows no class.
    loader: Any = GPT2Tokenizer if is_gpt2 else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(source, use_fast=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the model's own code and the converters raise
        raise ModelError(
            f"The tokenizer of {source} cannot be converted to tokenizer.json: {error}"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"The tokenizer of {source} exists only as Python code ({type(tokenizer).__name__}); it has no "
            "tokenizer.json equivalent, which this server needs."
        )
    return tokenizer.backend_tokenizer


def _with_byte_fallback(tokenizer: "Tokenizer") -> "Tokenizer":
    """What transformers leaves out of a Unigram model's: a character without a piece is its bytes (mT5)."""
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.to_str())
    if content["model"]["type"] != "Unigram" or content["model"]["byte_fallback"]:
        return tokenizer
    content["model"]["byte_fallback"] = True
    content["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, content["decoder"]]}
    return Tokenizer.from_str(json.dumps(content))
