"""Answers of a chat as OpenAI's messages: whole, and as the deltas of a stream.

The whole message is the fold of its deltas, so both tell the same.
"""

import uuid
from collections.abc import Iterator
from typing import Any

from msgspec import UNSET

from tgi_router.answer import Answer
from tgi_router.api.openai import finish_reason_of
from tgi_router.api.replies import encode_json
from tgi_router.schemas.openai_chat import ReplyFunction, ReplyMessage, ReplyToolCall
from tgi_router.text.message import CallArguments, CallName, Content, Delta, Message, Parser, PlainText

_ROLE = b'{"role":"assistant",'
_CONTENT = _ROLE + b'"content":%b}'


class MessageStream:
    """Reads one answer while it comes."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self._call_ids: list[str] = []
        # Clients count on a chunk for every token, as long as tokens are all there is.
        self.tells_every_token = isinstance(parser, PlainText)

    def push(self, text: str, *, is_last: bool) -> list[bytes]:
        """The deltas that this text adds, as JSON."""
        deltas = self._parser.push(text)
        if is_last:
            deltas += self._parser.finish()
        if len(deltas) == 1:  # as for nearly every token
            return [self._encode(deltas)]
        return [self._encode(group) for group in _grouped(deltas)]

    def finish_reason(self, answer: Answer) -> str:
        """Of an answer that is over, with its last text pushed."""
        reason = finish_reason_of(answer)
        return "tool_calls" if self._call_ids and reason == "stop" and not answer.is_cancelled else reason

    def _encode(self, group: list[Delta]) -> bytes:
        """Deltas that go into one chunk."""
        first = group[0]
        if len(group) == 1 and isinstance(first, Content):
            return _CONTENT % encode_json(first.text)
        text = "".join(delta.text for delta in group if not isinstance(delta, CallName))
        if isinstance(first, CallName | CallArguments):
            return b'%b"tool_calls":[%b]}' % (_ROLE, encode_json(self._call(first, text)))
        key = b"content" if isinstance(first, Content) else b"reasoning_content"
        return b'%b"%b":%b}' % (_ROLE, key, encode_json(text))

    def _call(self, first: CallName | CallArguments, arguments: str) -> dict[str, Any]:
        """Clients join the strings of a call's chunks: only the first tells its id and name."""
        call_id, name = "", None
        if isinstance(first, CallName):
            call_id, name = new_call_id(), first.name
            self._call_ids.append(call_id)
        function = {"name": name, "arguments": arguments}
        return {"index": first.index, "id": call_id, "type": "function", "function": function}


EMPTY_DELTA = _CONTENT % b'""'


def _grouped(deltas: list[Delta]) -> Iterator[list[Delta]]:
    """Neighbours that fit into one chunk: of one kind and, of calls, of one call."""
    group: list[Delta] = []
    for delta in deltas:
        if group and not _fits(group[-1], delta):
            yield group
            group = []
        group.append(delta)
    if group:
        yield group


def _fits(before: Delta, delta: Delta) -> bool:
    if isinstance(before, CallName | CallArguments):
        return isinstance(delta, CallArguments) and delta.index == before.index
    return type(before) is type(delta)


def whole_message(parser: Parser, answer: Answer) -> tuple[ReplyMessage, str]:
    """Of an answer that is over, and its finish reason."""
    message = Message()
    for text in (*(token.shown for token in answer.tokens), answer.rest):
        for delta in parser.push(text):
            message.add(delta)
    for delta in parser.finish():
        message.add(delta)
    calls = [
        ReplyToolCall(new_call_id(), "function", ReplyFunction(None, call.name, call.arguments))
        for call in message.calls
    ]
    reason = finish_reason_of(answer)
    if calls and reason == "stop" and not answer.is_cancelled:
        reason = "tool_calls"
    reply = ReplyMessage(
        "assistant",
        message.content if message.content or not calls else None,
        calls or UNSET,
        message.reasoning or UNSET,
    )
    return reply, reason


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex}"
