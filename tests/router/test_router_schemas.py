"""Bodies: what is accepted, what is refused with which status, and that the refusal names the field."""

from typing import Any

import msgspec
import pytest

from tgi_router.api.body import BodyReader
from tgi_router.errors import BodyError
from tgi_router.schemas.native import GenerateBody
from tgi_router.schemas.openai_chat import ChatBody, ImagePart, TextPart
from tgi_router.schemas.openai_completions import CompletionBody

GENERATE = BodyReader(GenerateBody, 1000)
CHAT = BodyReader(ChatBody, 1000)
COMPLETION = BodyReader(CompletionBody, 1000)
SYNTAX = "Failed to parse the request body as JSON: "
SHAPE = "Failed to deserialize the JSON body into the target type: "


def refused(reader: BodyReader[Any], data: bytes | str) -> tuple[int, str]:
    with pytest.raises(BodyError) as raised:
        reader.decode(data.encode() if isinstance(data, str) else data)
    return raised.value.status, str(raised.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b'{"inputs":"a"', b"nonsense", b'{"inputs":"\xff"}', b'{"inputs":"\\ud800"}', b"[" * 100_000],
)
def test_bad_syntax(data: bytes) -> None:
    status, message = refused(GENERATE, data)
    if data[:1] != b"[":
        assert (status, message[: len(SYNTAX)]) == (400, SYNTAX)
    assert status in (400, 422)


def test_deep_nesting_is_bad_syntax() -> None:
    assert refused(GENERATE, b'{"inputs":"a","x":' + b"[" * 100_000)[0] == 400


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("{}", "missing field `inputs`"),
        ("[]", "object"),
        ('{"inputs":3}', "inputs: "),
        ('{"inputs":null}', "inputs: "),
        ('{"inputs":"a","parameters":null}', "parameters: "),
        ('{"inputs":"a","stream":null}', "stream: "),
        ('{"inputs":"a","parameters":{"max_new_tokens":-1}}', "parameters.max_new_tokens: "),
        ('{"inputs":"a","parameters":{"max_new_tokens":20.0}}', "parameters.max_new_tokens: "),
        ('{"inputs":"a","parameters":{"max_new_tokens":4294967296}}', "parameters.max_new_tokens: "),
        ('{"inputs":"a","parameters":{"temperature":"a"}}', "parameters.temperature: "),
        ('{"inputs":"a","parameters":{"seed":-1}}', "parameters.seed: "),
        ('{"inputs":"a","parameters":{"seed":18446744073709551616}}', "`seed`"),
        ('{"inputs":"a","parameters":{"top_k":2147483648}}', "parameters.top_k: "),
        ('{"inputs":"a","parameters":{"stop":"x"}}', "parameters.stop: "),
        ('{"inputs":"a","parameters":{"do_sample":null}}', "parameters.do_sample: "),
        ('{"inputs":"a","parameters":{"do_sample":1}}', "parameters.do_sample: "),
        ('{"inputs":"a","inputs":"b"}', "duplicate field `inputs`"),
        ('{"inputs":"a","parameters":{"top_k":1,"top_k":2}}', "parameters: duplicate field `top_k`"),
    ],
)
def test_wrong_shape_of_a_native_body(body: str, named: str) -> None:
    status, message = refused(GENERATE, body)
    assert status == 422
    assert message.startswith(SHAPE)
    assert named in message


@pytest.mark.parametrize(
    ("reader", "body", "named"),
    [
        (
            COMPLETION,
            '{"prompt":[]}',
            "prompt: Empty array detected. Do not use an empty array for the prompt.",
        ),
        (COMPLETION, "{}", "missing field `prompt`"),
        (COMPLETION, '{"prompt":"a","max_tokens":-1}', "max_tokens: "),
        (CHAT, "{}", "missing field `messages`"),
        (CHAT, '{"messages":[{"role":"user"}]}', "messages[0]: "),
        (CHAT, '{"messages":[{"role":"user","content":null}]}', "messages[0]: "),
        (CHAT, '{"messages":[{"role":"user","content":[{"type":"audio"}]}]}', "messages[0].content[0]"),
        (CHAT, '{"messages":[{"content":"x"}]}', "messages[0]: missing field `role`"),
        (CHAT, '{"messages":[],"max_tokens":1,"max_completion_tokens":1}', "duplicate field `max_tokens`"),
    ],
)
def test_wrong_shape_of_an_openai_body(reader: BodyReader[Any], body: str, named: str) -> None:
    status, message = refused(reader, body)
    assert status == 422
    assert named in message


def test_the_same_name_deeper_down_is_no_duplicate() -> None:
    body = GENERATE.decode(b'{"inputs":"say \\"inputs\\"","extra":{"inputs":1,"inputs":2},"x":["inputs"]}')
    assert body.inputs == 'say "inputs"'


def test_unknown_fields_and_what_follows_the_value_are_ignored() -> None:
    body = GENERATE.decode(b'{"inputs":"a","parameters":{"nonsense":[1]},"more":{}} and then')
    assert body.parameters.do_sample is False


def test_parameters_left_out_are_not_the_same_as_empty() -> None:
    assert GENERATE.decode(b'{"inputs":"a"}').parameters.do_sample is True
    assert GENERATE.decode(b'{"inputs":"a","parameters":{}}').parameters.do_sample is False


def test_null_is_the_default_where_the_contract_says_so() -> None:
    names = [
        *("best_of", "temperature", "repetition_penalty", "frequency_penalty", "top_k", "top_p", "typical_p"),
        *("max_new_tokens", "return_full_text", "truncate", "seed", "top_n_tokens", "grammar", "adapter_id"),
    ]
    parameters = dict.fromkeys(names)
    body = GENERATE.decode(msgspec.json.encode({"inputs": "a", "parameters": parameters}))
    assert body.parameters == msgspec.convert({}, type(body.parameters))
    everything = {field.name: None for field in msgspec.structs.fields(ChatBody) if field.name != "messages"}
    assert CHAT.decode(msgspec.json.encode({"messages": [], **everything})) == ChatBody(messages=[])
    everything = {
        field.name: None for field in msgspec.structs.fields(CompletionBody) if field.name != "prompt"
    }
    assert COMPLETION.decode(msgspec.json.encode({"prompt": "a", **everything})) == CompletionBody(prompt="a")


def test_integers_are_floats_and_the_full_seed_fits() -> None:
    body = GENERATE.decode(b'{"inputs":"a","parameters":{"temperature":1,"seed":18446744073709551615}}')
    assert body.parameters.temperature == 1.0
    assert body.parameters.seed == 2**64 - 1


def test_message_forms() -> None:
    body = CHAT.decode(
        b'{"messages":[{"role":"user","content":[{"type":"text","text":"a"},'
        b'{"type":"image_url","image_url":{"url":"u","detail":"low"}}]},'
        b'{"role":"assistant","content":null,"tool_calls":[{"id":"1","type":"function",'
        b'"function":{"name":"f","parameters":{"a":1}}}]},'
        b'{"role":"tool","content":"","tool_call_id":7,"name":"f"}],"stop":"x"}'
    )
    assert body.messages[0].content == [
        TextPart("a"),
        ImagePart(msgspec.convert({"url": "u"}, ImagePart.__annotations__["image_url"])),
    ]
    calls = body.messages[1].tool_calls
    assert calls is not None
    assert calls[0].function.given_arguments == {"a": 1}
    assert body.stop == "x"
