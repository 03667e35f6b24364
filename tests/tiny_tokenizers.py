"""A tokenizer folder made without torch: byte-level BPE over a part of ASCII, so that any ids are text."""

import json
import string
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

BOS_ID, EOS_ID = 0, 1
SPECIAL = ("<s>", "</s>", "<|end|>")
PAIRS = (("t", "h"), ("a", "n"), ("Ġ", "i"), ("o", "n"))
CHARACTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits + " \n.,:!?'|<>/[]_{}\"-+\\"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_level(character: str) -> str:
    """How byte-level BPE writes an ASCII character."""
    return {" ": "Ġ", "\n": "Ċ"}.get(character, character)


def vocabulary() -> dict[str, int]:
    texts = [*SPECIAL, *map(byte_level, CHARACTERS), *(a + b for a, b in PAIRS)]
    return {text: token_id for token_id, text in enumerate(texts)}


VOCAB_SIZE = len(vocabulary())


def ids(text: str) -> list[int]:
    """One id a character."""
    known = vocabulary()
    return [known[byte_level(character)] for character in text]


def save(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, adds_bos: bool = True) -> Path:
    return save_tokenizer(_build(adds_bos), folder, chat_template=chat_template)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, chat_template: str | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _build(adds_bos: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary(), merges=list(PAIRS)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
        )
    return tokenizer
