"""Detokenizer, stop strings and tokenizer: pure properties over every way to cut a text into tokens."""

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import split_tokenizers
import tiny_tokenizers
from tgi_router.schemas.numbers import shortest_float32, to_float32
from tgi_router.text.detokenizer import Detokenizer, final_text
from tgi_router.text.stopping import StopAnywhere, StopAtTokenEnd
from tgi_router.text.tokenizer import Tokenizer as OurTokenizer
from tgi_router.text.tokenizer import TokenizerUnavailable

TEXTS = (
    "plain words, and a number: 42\n",
    "naïve café — “quoted”",
    "日本語のテキスト、中文、한국어",
    "👩‍👩‍👧‍👦 families 🇨🇭 flags 🏳️‍🌈",
    "mixed 🙂é日\n\n\tend 🙂",
)


def bytes_to_characters() -> dict[int, str]:
    """The alphabet of byte-level BPE: printable bytes stand for themselves, the others follow behind 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + i) for i, byte in enumerate(others)}


def piece_id(tokenizer: Tokenizer, piece: str) -> int:
    token_id = tokenizer.token_to_id(piece)
    assert token_id is not None
    return token_id


class ByteLevel:
    """Any run of bytes can be a token."""

    def __init__(self, pieces: set[bytes]) -> None:
        table = bytes_to_characters()
        self.id_of = {piece: i for i, piece in enumerate(sorted(pieces))}
        vocab = {"".join(table[byte] for byte in piece): i for piece, i in self.id_of.items()}
        self.tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        self.tokenizer.decoder = decoders.ByteLevel()
        self.tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
        self.special_id = piece_id(self.tokenizer, "</s>")

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def cut(data: bytes, draw: random.Random) -> list[bytes]:
    pieces, start = [], 0
    while start < len(data):
        end = start + draw.randint(1, 5)
        pieces.append(data[start:end])
        start = end
    return pieces


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("seed", range(8))
def test_pieces_of_characters_come_out_whole(text: str, seed: int) -> None:
    draw = random.Random(seed)
    prompt, answer = cut(b"prompt: ", draw), cut(text.encode(), draw)
    made = ByteLevel({*prompt, *answer})
    decode = made.decode
    ids = [made.id_of[piece] for piece in answer]
    detokenizer = Detokenizer(decode, {made.special_id}, [made.id_of[piece] for piece in prompt])
    shown = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown)
    assert detokenizer.flush() == ""
    # A token adds all that is whole after it: nothing is held back longer than its last byte.
    told, num_bytes = "", 0
    for piece, data in zip(shown, answer, strict=True):
        told, num_bytes = told + piece, num_bytes + len(data)
        assert told == text.encode()[:num_bytes].decode(errors="ignore")


@pytest.mark.parametrize("text", TEXTS)
def test_a_cut_off_character_is_dropped_and_nothing_else(text: str) -> None:
    data = text.encode()
    made = ByteLevel({bytes([byte]) for byte in data})
    ids = [made.id_of[bytes([byte])] for byte in data]
    for end in range(1, len(ids) + 1):
        expected = data[:end].decode(errors="ignore")
        assert final_text(made.decode, {made.special_id}, [], ids[:end]) == expected
        detokenizer = Detokenizer(made.decode, {made.special_id}, [])
        assert "".join(map(detokenizer.push, ids[:end])) + detokenizer.flush() == expected


def test_a_special_token_speaks_for_itself_and_ends_half_a_character() -> None:
    made = ByteLevel({b"a", "é".encode()[:1], b" b"})
    detokenizer = Detokenizer(made.decode, {made.special_id}, [made.id_of[b"a"]])
    half = made.id_of["é".encode()[:1]]
    pushed = [half, made.special_id, made.id_of[b" b"]]
    assert [detokenizer.push(token_id) for token_id in pushed] == ["", "</s>", " b"]
    assert final_text(made.decode, {made.special_id}, [], [made.id_of[b"a"], made.special_id]) == "a"


@pytest.mark.parametrize("seed", range(40))
def test_byte_level_tokens_need_no_decoding_for_the_same_text(seed: int) -> None:
    """Also where the bytes are no text, and where a character or a special token stands between."""
    draw = random.Random(seed)
    data = "".join(draw.choices(TEXTS, k=3)).encode()
    spoilt = bytes(byte if draw.random() < 0.9 else draw.randrange(256) for byte in data)
    made = ByteLevel({bytes([byte]) for byte in range(256)} | {*cut(data, draw), "\ufffd".encode()})
    ids = [*made.id_of.values(), made.special_id]
    pieces = [made.id_of.get(piece, made.special_id) for piece in cut(data, random.Random(seed))]
    singles = [made.id_of[bytes([byte])] for byte in spoilt]
    mixed = [*pieces, *draw.choices(ids, k=100), *singles]
    context = draw.choices(ids, k=draw.randrange(6))
    plain = Detokenizer(made.decode, {made.special_id}, context)
    quick = Detokenizer(made.decode, {made.special_id}, context, lambda token_id: made.decode([token_id]))
    for token_id in mixed:
        assert quick.push(token_id) == plain.push(token_id)
    assert quick.flush() == plain.flush()


def test_a_tokenizer_knows_whether_it_is_byte_level(tmp_path: Path) -> None:
    for kind in split_tokenizers.KINDS:
        folder = tmp_path / kind
        folder.mkdir()
        split_tokenizers.build(kind, [b"ab"]).tokenizer.save(str(folder / "tokenizer.json"))
        tokenizer = OurTokenizer.load(folder, num_workers=1)
        assert (tokenizer.decode_byte_level is not None) == (kind == "byte_level")
        tokenizer.close()


def test_bytes_that_never_become_a_character_do_not_pile_up() -> None:
    made = ByteLevel({b"\x80", b"x"})
    detokenizer = Detokenizer(made.decode, set(), [])
    shown = [detokenizer.push(made.id_of[b"\x80"]) for _ in range(100)]
    assert sum(map(bool, shown)) >= 10
    assert detokenizer.push(made.id_of[b"x"]).endswith("x")


def sentencepiece_tokenizer() -> Tokenizer:
    """Llama 2's kind: word starts are ▁, unknown characters are bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("▁", "▁Hello", "▁world", "ing", "▁a", "b"):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")])
    return tokenizer


def test_word_starts_keep_their_space_and_byte_fallback_is_whole() -> None:
    tokenizer = sentencepiece_tokenizer()
    prompt = [1, piece_id(tokenizer, "▁Hello")]
    answer = [
        piece_id(tokenizer, "▁world"),
        piece_id(tokenizer, "ing"),
        *(3 + byte for byte in "🙂".encode()),
        piece_id(tokenizer, "▁a"),
        2,
    ]
    detokenizer = Detokenizer(_decode(tokenizer), {1, 2}, prompt)
    shown = [detokenizer.push(token_id) for token_id in answer]
    assert shown == [" world", "ing", "", "", "", "🙂", " a", "</s>"]
    assert final_text(_decode(tokenizer), {1, 2}, prompt[-1:], answer) == " worlding🙂 a"


def test_byte_fallback_cut_at_any_byte() -> None:
    tokenizer = sentencepiece_tokenizer()
    data = "é🙂日é🙂🙂".encode()
    ids = [3 + byte for byte in data]
    context = [piece_id(tokenizer, "b")]
    for end in range(1, len(ids) + 1):
        expected = data[:end].decode(errors="ignore")
        assert final_text(_decode(tokenizer), {1, 2}, context, ids[:end]) == expected
        detokenizer = Detokenizer(_decode(tokenizer), {1, 2}, context)
        assert "".join(map(detokenizer.push, ids[:end])) + detokenizer.flush() == expected


def _decode(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


# Stop strings


def test_stop_at_token_end_is_tgi_s() -> None:
    def ends(stop: list[str], *pieces: str) -> int | None:
        """Index of the piece that ends it."""
        stopping = StopAtTokenEnd(stop)
        return next((i for i, piece in enumerate(pieces) if stopping.push(piece)), None)

    assert ends(["stop"], "a", "st", "op", "b") == 2
    assert ends(["stop"], "a", "stopped") is None  # in the middle of a token: not seen
    assert ends(["stop"], "a stop\n") == 0  # one newline does not hide it
    assert ends(["stop"], "a stop\n\n") is None
    assert ends(["\n"], "x\n") == 0
    assert ends(["STOP"], "stop") is None
    assert ends(["x" * 400], *["x" * 50] * 8) == 7  # TGI forgets beyond 200 characters; we do not
    assert ends([], "anything") is None


@pytest.mark.parametrize("seed", range(200))
def test_stop_anywhere_cuts_at_the_first_occurrence_however_tokens_fall(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choice("abc") for _ in range(draw.randint(0, 30)))
    stop = ["".join(draw.choice("abc") for _ in range(draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
    starts = [start for start in (text.find(one) for one in stop) if start >= 0]
    stopping = StopAnywhere(stop)
    shown, stopped, told = "", False, ""
    position = 0
    while position < len(text) and not stopped:
        size = draw.randint(1, 4)
        piece, stopped = stopping.push(text[position : position + size])
        position += size
        shown += piece
        told = text[:position]
        # Held back is only what may become a stop string.
        if not stopped:
            held = told[len(shown) :]
            assert held == "" or any(one.startswith(held) for one in stop)
    if not stopped:
        shown += stopping.flush()
    # The earliest of those that are complete when one is.
    seen = [start for start in (told.find(one) for one in stop) if start >= 0]
    assert stopped == bool(starts)
    assert shown == (told[: min(seen)] if seen else text)


def test_stop_anywhere_sees_the_text_of_special_tokens() -> None:
    stopping = StopAnywhere(["a<|end|>"])
    assert stopping.push("xa") == ("x", False)
    assert stopping.would_end_with("<|end|>")
    assert not stopping.would_end_with("</s>")


# The tokenizer


async def test_tokenizer_knows_its_special_tokens(tmp_path: Path) -> None:
    tokenizer = OurTokenizer.load(tiny_tokenizers.save(tmp_path), num_workers=1)
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    encoded = await tokenizer.encode("hi", add_special_tokens=True)
    assert encoded.token_ids == [0, *tiny_tokenizers.ids("hi")]
    assert encoded.num_leading_special == 1
    assert (await tokenizer.encode("hi", add_special_tokens=False)).num_leading_special == 0
    assert tokenizer.decode([0, *tiny_tokenizers.ids("hi"), 1]) == "<s>hi</s>"
    tokenizer.close()


@pytest.mark.parametrize("with_offsets", [False, True])
async def test_encoding_a_long_text_stops_nobody_else(tmp_path: Path, with_offsets: bool) -> None:
    tokenizer = OurTokenizer.load(tiny_tokenizers.save(tmp_path), num_workers=1)
    began_at = last_at = time.monotonic()
    longest_gap = 0.0
    encoding = asyncio.create_task(
        tokenizer.encode("word " * 400_000, add_special_tokens=True, with_offsets=with_offsets)
    )
    while not encoding.done():
        await asyncio.sleep(0.001)
        longest_gap = max(longest_gap, time.monotonic() - last_at)
        last_at = time.monotonic()
    assert longest_gap < (last_at - began_at) / 2
    tokenizer.close()


def test_a_token_named_in_the_config_is_special_even_if_the_vocabulary_does_not_say_so(
    tmp_path: Path,
) -> None:
    tiny_tokenizers.save(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"additional_special_tokens": ["q", {"content": "z"}]})
    )
    tokenizer = OurTokenizer.load(tmp_path, num_workers=1)
    assert tokenizer.special_ids == {0, 1, 2, *tiny_tokenizers.ids("qz")}
    tokenizer.close()


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerUnavailable, match=r"has no tokenizer\.json"):
        OurTokenizer.load(tmp_path, num_workers=1)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerUnavailable, match="cannot be read"):
        OurTokenizer.load(tmp_path, num_workers=1)


def test_pre_tokenizer_is_not_needed_for_the_alphabet() -> None:
    assert set(bytes_to_characters().values()) == set(pre_tokenizers.ByteLevel.alphabet())


# Numbers


def test_shortest_float32() -> None:
    assert shortest_float32(-0.1474609375) == -0.14746094
    assert shortest_float32(to_float32(0.1)) == 0.1
    assert shortest_float32(to_float32(-1.9)) == -1.9
    assert shortest_float32(float("nan")) is None
    assert shortest_float32(float("-inf")) is None
    assert to_float32(1e39) == float("inf")
    assert to_float32(1e-50) == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_shortest_float32_is_numpy_s(seed: int) -> None:
    numpy = pytest.importorskip("numpy")
    draw = random.Random(seed)
    for _ in range(200):
        value = to_float32(-draw.expovariate(1.0) * 10 ** draw.randint(-6, 3))
        assert shortest_float32(value) == float(str(numpy.float32(value)))
