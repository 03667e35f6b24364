"""tokenizer.json, the one tokenizer format that the router reads: made once for models with an older one."""

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

from tgi_shard.model_folder import ModelError

logger = logging.getLogger(__name__)

FILE_NAME = "tokenizer.json"

_VOCABULARIES = ("*.model", "*.tiktoken", "vocab.json", "vocab.txt")


def is_missing(folder: Path) -> bool:
    return not (folder / FILE_NAME).is_file()


def convert(source: Path, folder: Path, *, trust_remote_code: bool) -> None:
    """Write `folder`/tokenizer.json from the tokenizer files of `source`, through transformers.

    Raises ModelError when there is no tokenizer, or one that has no equivalent in that format.
    """
    vocabularies = sorted(path for pattern in _VOCABULARIES for path in source.glob(pattern))
    if not vocabularies:
        raise ModelError(f"There is no tokenizer in {source}: neither tokenizer.json nor an older format.")
    if (
        any(path.suffix == ".model" for path in vocabularies)
        and importlib.util.find_spec("sentencepiece") is None
    ):
        # Without the library transformers takes the file for another format and reports the wrong thing as
        # missing.
        raise ModelError(
            f"{vocabularies[0]} is a SentencePiece tokenizer; converting it to tokenizer.json needs "
            "`pip install sentencepiece`."
        )
    logger.info("There is no tokenizer.json in %s. Converting %s.", source, vocabularies[0].name)
    tokenizer = _load(source, trust_remote_code)
    if not tokenizer.is_fast:
        raise ModelError(
            f"The tokenizer of {source} exists only as Python code ({type(tokenizer).__name__}); it has no "
            "tokenizer.json equivalent, which this server needs."
        )
    partial = folder / f".{FILE_NAME}.{os.getpid()}.partial"
    try:
        tokenizer.backend_tokenizer.save(str(partial))
        partial.replace(folder / FILE_NAME)
    finally:
        partial.unlink(missing_ok=True)


def _load(source: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer  # slow to import, and most models never come here

    try:
        return AutoTokenizer.from_pretrained(source, use_fast=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the model's own code and the converters raise
        raise ModelError(
            f"The tokenizer of {source} cannot be converted to tokenizer.json: {error}"
        ) from error
