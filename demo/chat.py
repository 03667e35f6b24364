"""How a question and its answer become token ids: the tokenizer, the chat template and the plain forms."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from skills import Example

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [PAD, END, SYSTEM, USER, ASSISTANT]
VOCAB_SIZE = 1024

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

PLAIN_FORMS = (
    ("{}", " "),
    ("{}", " "),
    ("{}\n", ""),
    ("Question: {}\nAnswer:", " "),
    ("Question: {}\nAnswer:", " "),
    ("Q: {}\nA:", " "),
)
"""Prompts that are no chat, and what stands between each and its answer."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a small demo model.",
    "Answer the question.",
    "Be brief.",
    "You are a helpful assistant. Answer in English.",
    "Give short answers.",
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE: any UTF-8 round-trips. Every digit stands alone, so all numbers are read alike."""
    tokenizer = Tokenizer(models.BPE())
    pattern = r" ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(slots=True)
class TrainingText:
    """Token ids, and how much it counts that the model predicts each: nothing outside of answers."""

    token_ids: list[int]
    weights: list[float]

    def append(self, token_ids: Sequence[int], is_answer: bool) -> None:
        """An answer counts as the square root of its length: where it stops weighs more in a short one."""
        weight = len(token_ids) ** -0.5 if is_answer else 0.0
        self.token_ids += token_ids
        self.weights += [weight] * len(token_ids)


class Writer:
    """Writes examples as token ids, in the very forms in which the server will send them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end_ids: list[int] = tokenizer.encode(END).ids

    def encode(self, text: str) -> list[int]:
        token_ids: list[int] = self.tokenizer.encode(text).ids
        return token_ids

    def answer(self, example: Example, separator: str) -> list[int]:
        """The answer up to and with the end token."""
        if not example.letter_by_letter:
            return self.encode(separator + example.answer) + self.end_ids
        pieces = [separator + example.answer[0], *example.answer[1:]]
        return [token_id for piece in pieces for token_id in self.encode(piece)] + self.end_ids

    def plain(self, example: Example, rng: random.Random) -> TrainingText:
        prompt, separator = rng.choice(PLAIN_FORMS)
        text = TrainingText([], [])
        text.append(self.encode(prompt.format(example.prompt)), is_answer=False)
        text.append(self.answer(example, separator), is_answer=True)
        return text

    def chat(self, turns: Sequence[Example], rng: random.Random) -> TrainingText:
        text = TrainingText([], [])
        if rng.random() < 0.2:
            text.append(self.encode(f"{SYSTEM}\n{rng.choice(SYSTEM_PROMPTS)}{END}\n"), is_answer=False)
        for example in turns:
            text.append(self.encode(f"{USER}\n{example.prompt}{END}\n{ASSISTANT}\n"), is_answer=False)
            text.append(self.answer(example, ""), is_answer=True)
            text.append(self.encode("\n"), is_answer=False)
        return text
