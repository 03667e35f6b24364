"""Log-probabilities in OpenAI's two shapes: a list of objects (chat), four parallel lists (completions)."""

from dataclasses import dataclass, field

from tgi_router.answer import Answer, GeneratedToken
from tgi_router.schemas.numbers import shortest_float32
from tgi_router.schemas.openai_chat import TokenLogprob, TopLogprob
from tgi_router.schemas.openai_completions import CompletionLogprobs
from tgi_router.text.detokenizer import UNFINISHED, Detokenizer
from tgi_router.text.tokenizer import Tokenizer


def chat_logprob(tokenizer: Tokenizer, answer: Answer, token: GeneratedToken) -> TokenLogprob:
    return TokenLogprob(
        token.text,
        shortest_float32(token.logprob),
        list(token.text.encode()),
        [
            TopLogprob(
                token.text if token_id == token.id else alternative_text(tokenizer, token_id),
                shortest_float32(logprob),
                list(token.text.encode() if token_id == token.id else tokenizer.token_bytes(token_id)),
            )
            for token_id, logprob in asked_top_tokens(answer, token)
        ],
    )


def asked_top_tokens(answer: Answer, token: GeneratedToken) -> tuple[tuple[int, float], ...]:
    """Without what ties with the last of them: TGI gives those too, OpenAI as many as were asked for."""
    return token.top_tokens[: answer.request.top_n_tokens]


def alternative_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token by itself; one that is a part of a character as its bytes: `\\xe2\\x82`."""
    text = tokenizer.decode_one(token_id)
    if UNFINISHED in text:
        return "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(token_id))
    return text


@dataclass(slots=True)
class CompletionLogprobsWriter:
    """One choice's lists, token by token; it keeps count of the characters."""

    tokenizer: Tokenizer
    answer: Answer
    num_characters: int = field(default=0, init=False)  # of the choice's text before the next token

    def prompt(self) -> CompletionLogprobs:
        """Of an echoed prompt. A shard tells no alternatives to its tokens: each stands alone."""
        request = self.answer.request
        special_ids = self.tokenizer.special_ids
        detokenizer = Detokenizer(self.tokenizer.decode, special_ids, ())
        lists = CompletionLogprobs([], [], [], [])
        logprobs = [None, *map(shortest_float32, self.answer.prompt_logprobs)]
        # A cancelled answer may not have got them all.
        logprobs.extend([None] * (len(request.prompt_token_ids) - len(logprobs)))
        num_hidden = self._num_hidden()
        for position, (token_id, logprob) in enumerate(zip(request.prompt_token_ids, logprobs, strict=True)):
            text = detokenizer.push(token_id)
            lists.tokens.append(text)
            lists.token_logprobs.append(logprob)
            lists.top_logprobs.append(None if position == 0 else {text: logprob})
            lists.text_offset.append(min(self.num_characters, len(request.prompt)))
            self.num_characters += len(text) if position >= num_hidden else 0
        self.num_characters = len(request.prompt)
        return lists

    def _num_hidden(self) -> int:
        """Special tokens in front of the prompt that its text, as it was typed, does not show."""
        request = self.answer.request
        for position, token_id in enumerate(request.prompt_token_ids):
            if token_id not in self.tokenizer.special_ids:
                return position
            if request.prompt.startswith(self.tokenizer.decode_one(token_id)):
                return position
        return len(request.prompt_token_ids)

    def token(self, token: GeneratedToken) -> CompletionLogprobs:
        logprob = shortest_float32(token.logprob)
        top_logprobs: dict[str, float | None] = {}
        for token_id, top_logprob in asked_top_tokens(self.answer, token):
            text = token.text if token_id == token.id else alternative_text(self.tokenizer, token_id)
            top_logprobs.setdefault(text, shortest_float32(top_logprob))
        top_logprobs.setdefault(token.text, logprob)
        offset = self.num_characters
        self.num_characters += 0 if token.special else len(token.text)
        return CompletionLogprobs([token.text], [logprob], [top_logprobs], [offset])


def joined(pieces: list[CompletionLogprobs]) -> CompletionLogprobs:
    return CompletionLogprobs(
        [one for piece in pieces for one in piece.tokens],
        [one for piece in pieces for one in piece.token_logprobs],
        [one for piece in pieces for one in piece.top_logprobs],
        [one for piece in pieces for one in piece.text_offset],
    )
