"""Text <-> token ids, by the model folder's tokenizer.json.

Encoding runs in worker threads, as batches of one: `encode_batch` releases the GIL; `encode` holds it, and
30,000 tokens take it 30 ms in which no stream moves. Decoding a few ids takes a microsecond, in place.
"""

import asyncio
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import ByteLevel

from tgi_router.text.detokenizer import UNFINISHED

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte, as SentencePiece's vocabularies write it


def _byte_characters() -> dict[str, int]:
    """How byte-level BPE writes bytes: what prints is itself, the others are U+0100 and following."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_characters()


class TokenizerUnavailable(Exception):
    """The model folder has no tokenizer that the router can read."""


@dataclass(frozen=True, slots=True)
class Encoded:
    token_ids: list[int]
    num_leading_special: int  # special tokens that the tokenizer put in front (BOS)
    # In characters of the text; (0, 0) for an added special token. Empty if not asked for: so many pairs hold
    # the GIL for milliseconds where the prompt is long.
    offsets: list[tuple[int, int]]


class Tokenizer:
    """special_tokens: what tokenizer_config.json and special_tokens_map.json name: "bos_token" -> "<s>" …"""

    def __init__(
        self, tokenizer: FastTokenizer, special_tokens: dict[str, str | list[str]], *, num_workers: int
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._workers = ThreadPoolExecutor(num_workers, thread_name_prefix="tokenizer")
        self.special_tokens = special_tokens
        self.special_ids = _special_ids(tokenizer, special_tokens)
        self.decode_one = lru_cache(maxsize=1 << 16)(self._decode_one)
        is_byte_level = isinstance(tokenizer.decoder, ByteLevel)
        self.decode_byte_level = self.decode_one if is_byte_level else None  # see Detokenizer

    @classmethod
    def load(cls, folder: Path, *, num_workers: int, config_path: Path | None = None) -> "Tokenizer":
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerUnavailable(
                f"{folder} has no tokenizer.json. Convert the tokenizer once with "
                "`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`."
            )
        try:
            tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerUnavailable(f"{path} cannot be read: {error}") from error
        special_tokens = read_special_tokens(folder, config_path)
        return cls(tokenizer, special_tokens, num_workers=num_workers)

    async def encode(self, text: str, *, add_special_tokens: bool, with_offsets: bool = False) -> Encoded:
        """Raises what the tokenizer raises."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, self._encode, text, add_special_tokens, with_offsets)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids that stand together, special tokens included."""
        if len(token_ids) == 1:
            return self.decode_one(token_ids[0])
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def to_json(self) -> str:
        """As in tokenizer.json."""
        return str(self._tokenizer.to_str())

    def token_bytes(self, token_id: int) -> bytes:
        """What a token writes, also if that is only a part of a character."""
        text = self.decode_one(token_id)
        piece = self._tokenizer.id_to_token(token_id)
        if UNFINISHED not in text or piece is None:
            return text.encode()
        if (byte := _BYTE_PIECE.fullmatch(piece)) is not None:
            return bytes([int(byte[1], 16)])
        if all(character in _BYTE_OF_CHARACTER for character in piece):
            return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
        return text.encode()

    def text_of(self, token_id: int) -> str:
        """A token by itself, without those of its bytes that are only a part of a character."""
        text = self.decode_one(token_id)
        return self.token_bytes(token_id).decode(errors="ignore") if UNFINISHED in text else text

    def _decode_one(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def close(self) -> None:
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _encode(self, text: str, add_special_tokens: bool, with_offsets: bool) -> Encoded:
        tokenizer = self._tokenizer
        encode_batch = tokenizer.encode_batch if with_offsets else tokenizer.encode_batch_fast
        encoding = encode_batch([text], add_special_tokens=add_special_tokens)[0]
        mask = encoding.special_tokens_mask
        num_leading_special = mask.index(0) if 0 in mask else len(mask)
        return Encoded(encoding.ids, num_leading_special, encoding.offsets if with_offsets else [])


def read_special_tokens(folder: Path, config_path: Path | None = None) -> dict[str, str | list[str]]:
    """Names and texts of the special tokens; tokenizer_config.json wins over special_tokens_map.json."""
    named: dict[str, str | list[str]] = {}
    for path in (folder / "special_tokens_map.json", config_path or folder / "tokenizer_config.json"):
        if not path.is_file():
            continue
        for key, value in read_json_object(path).items():
            if key == "additional_special_tokens" and isinstance(value, list):
                named[key] = [text for text in map(_token_text, value) if text is not None]
            elif key.endswith("_token") and (text := _token_text(value)) is not None:
                named[key] = text
    return named


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises TokenizerUnavailable with the file's name."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerUnavailable(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerUnavailable(f"{path} is not a JSON object")
    return content


def _token_text(value: Any) -> str | None:
    """A token is written as its text or as an object that holds it under `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_ids(tokenizer: FastTokenizer, named: dict[str, str | list[str]]) -> frozenset[int]:
    ids = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for value in named.values():
        for text in [value] if isinstance(value, str) else value:
            if (token_id := tokenizer.token_to_id(text)) is not None:
                ids.add(token_id)
    return frozenset(ids)
