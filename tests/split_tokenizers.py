"""Tokenizers that can split one text over tokens in many ways, within characters too.

Two kinds: byte-level, where a token is any run of bytes, and byte fallback as SentencePiece's models have it,
where a token is a run of characters or a single byte.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

Kind = Literal["byte_level", "byte_fallback"]
KINDS: tuple[Kind, ...] = ("byte_level", "byte_fallback")

EOS = "</s>"


@dataclass(frozen=True)
class SplitTokenizer:
    tokenizer: Tokenizer
    kind: Kind
    special: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def special_id(self, text: str) -> int:
        token_id = self.tokenizer.token_to_id(text)
        assert token_id is not None
        return int(token_id)

    def bytes_of(self, token_id: int) -> bytes:
        """Of a token that is not special."""
        name = self.tokenizer.id_to_token(token_id)
        if self.kind == "byte_level":
            return bytes(map(_CHARACTER_OF_BYTE.index, name))
        is_byte = name.startswith("<0x")
        return bytes([int(name[3:5], 16)]) if is_byte else name.replace("▁", " ").encode()

    @property
    def eos_id(self) -> int:
        return self.special_id(EOS)

    def ids(self, pieces: Iterable[bytes]) -> list[int]:
        """Of pieces that were given to `build`; others byte by byte."""
        token_ids: list[int] = []
        for piece in pieces:
            name = _name(self.kind, piece)
            if name is not None and (whole := self.tokenizer.token_to_id(name)) is not None:
                token_ids.append(whole)
            else:
                token_ids += (self.tokenizer.token_to_id(_byte_name(self.kind, byte)) for byte in piece)
        return token_ids


def build(kind: Kind, pieces: Iterable[bytes], special: tuple[str, ...] = ()) -> SplitTokenizer:
    """All single bytes are tokens, and these pieces; EOS is a special token beside those given."""
    names = [_byte_name(kind, byte) for byte in range(256)]
    names += sorted({name for piece in pieces if (name := _name(kind, piece)) is not None} - set(names))
    if kind == "byte_level":
        vocabulary = {name: token_id for token_id, name in enumerate(names)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        vocabulary = {name: token_id for token_id, name in enumerate(dict.fromkeys(["<unk>", "▁", *names]))}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        replace = decoders.Replace("▁", " ")
        tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in (EOS, *special)]
    )
    return SplitTokenizer(tokenizer, kind, (EOS, *special))


def split(data: bytes, rng: random.Random) -> list[bytes]:
    """Pieces of random length: now bytes, now words."""
    longest = rng.choice((1, 2, 5, 12))
    pieces, start = [], 0
    while start < len(data):
        end = start + rng.randint(1, longest)
        pieces.append(data[start:end])
        start = end
    return pieces


def _name(kind: Kind, piece: bytes) -> str | None:
    """How the vocabulary writes it. Byte fallback has no names for runs of bytes that are no characters."""
    if kind == "byte_level":
        return "".join(_CHARACTER_OF_BYTE[byte] for byte in piece)
    if len(piece) == 1:
        return _byte_name(kind, piece[0])
    try:
        return piece.decode().replace(" ", "▁")
    except UnicodeDecodeError:
        return None


def _byte_name(kind: Kind, byte: int) -> str:
    return _CHARACTER_OF_BYTE[byte] if kind == "byte_level" else f"<0x{byte:02X}>"


def _characters_of_bytes() -> list[str]:
    """GPT-2's table: what prints is itself, the others are U+0100 and following."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256))
    return [chr(byte) if byte in printable else chr(256 + next(others)) for byte in range(256)]


_CHARACTER_OF_BYTE = _characters_of_bytes()
