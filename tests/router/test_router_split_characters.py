"""Characters whose bytes are spread over tokens: on every route they are whole, or not there at all."""

import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import split_tokenizers
from router_app import Running, running
from scripted_shard import ScriptedShard
from split_tokenizers import Kind

ANSWER = "a 🗼東京 e\u0301ñ न\u092e 👩‍👧"
PROMPT = "so: 京🗼"  # the answer begins behind bytes of a character
UNFINISHED = "\ufffd"

Route = Callable[[Running, int], Awaitable[str]]  # the text of an answer of so many tokens


async def asked(router: Running, path: str, body: dict[str, Any]) -> Any:
    """The body of the reply, or the events of the stream: nowhere in them is a mark for half a character."""
    response = await router.post(path, body)
    assert response.status_code == 200, response.text
    assert UNFINISHED not in response.text
    assert "\\ufffd" not in response.text.lower()
    if not response.headers["content-type"].startswith("text/event-stream"):
        return response.json()
    blocks = [block.removeprefix("data: ") for block in response.text.split("\n\n") if block]
    return [json.loads(block) for block in blocks if block != "[DONE]"]


def native(path: str, *, stream: bool = False) -> Route:
    async def text(router: Running, num_tokens: int) -> str:
        parameters = {
            "max_new_tokens": num_tokens,
            "details": True,
            "top_n_tokens": 5,
            "return_full_text": False,
        }
        if not stream:
            parameters["decoder_input_details"] = True
        reply = await asked(router, path, {"inputs": PROMPT, "parameters": parameters, "stream": stream})
        if stream:
            tokens = [event["token"]["text"] for event in reply]
            generated = reply[-1]["generated_text"]
        else:
            (reply,) = reply if isinstance(reply, list) else [reply]
            tokens = [token["text"] for token in reply["details"]["tokens"]]
            generated = reply["generated_text"]
            assert "".join(token["text"] for token in reply["details"]["prefill"]) == PROMPT
        assert "".join(tokens) == generated
        return str(generated)

    return text


def chat(path: str, *, stream: bool = False) -> Route:
    async def text(router: Running, num_tokens: int) -> str:
        body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": num_tokens, "stream": stream}
        reply = await asked(router, path, body | {"logprobs": True, "top_logprobs": 5})
        if not stream:
            choice = reply["choices"][0]
            content = str(choice["message"]["content"])
            assert "".join(token["token"] for token in choice["logprobs"]["content"]) == content
            return content
        return "".join(event["choices"][0]["delta"]["content"] for event in reply)

    return text


def completion(path: str, *, stream: bool = False) -> Route:
    async def text(router: Running, num_tokens: int) -> str:
        body = {"prompt": PROMPT, "max_tokens": num_tokens, "stream": stream, "echo": True, "logprobs": 5}
        reply = await asked(router, path, body)
        choices = [event["choices"][0] for event in reply] if stream else [reply["choices"][0]]
        whole = "".join(choice["text"] for choice in choices)
        assert whole.startswith(PROMPT)
        assert "".join(token for choice in choices for token in choice["logprobs"]["tokens"]) == whole
        return whole.removeprefix(PROMPT)

    return text


async def kserve(router: Running, num_tokens: int) -> str:
    data = list(PROMPT.encode())
    body = {
        "id": "1",
        "parameters": {"max_new_tokens": num_tokens},
        "inputs": [{"name": "in", "shape": [1, len(data)], "datatype": "BYTES", "data": data}],
        "outputs": [{"name": "out"}],
    }
    reply = await asked(router, "/v2/models/some/model/versions/1/infer", body)
    text = bytes(reply["outputs"][0]["data"]).decode()
    assert UNFINISHED not in text
    return text


async def vertex(router: Running, num_tokens: int) -> str:
    instances = [
        {"inputs": PROMPT, "parameters": {"max_new_tokens": num_tokens}},
        {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": num_tokens},
    ]
    first, second = (await asked(router, "/vertex", {"instances": instances}))["predictions"]
    assert first == second
    return str(first)


ROUTES: dict[str, Route] = {
    "generate": native("/generate"),
    "generate_stream": native("/generate_stream", stream=True),
    "compatible": native("/"),
    "compatible_stream": native("/", stream=True),
    "chat": chat("/v1/chat/completions"),
    "chat_stream": chat("/v1/chat/completions", stream=True),
    "completions": completion("/v1/completions"),
    "completions_stream": completion("/v1/completions", stream=True),
    "kserve": kserve,
    "vertex": vertex,
    "sagemaker": native("/invocations"),
    "sagemaker_stream": native("/invocations", stream=True),
    "sagemaker_chat": chat("/invocations"),
    "sagemaker_completions_stream": completion("/invocations", stream=True),
}


@pytest.mark.parametrize(("kind", "seed"), [("byte_level", 0), ("byte_level", 1), ("byte_fallback", 1)])
async def test_never_half_a_character(kind: Kind, seed: int, tmp_path: Path) -> None:
    """Also where `max_new_tokens` cuts within one: what is whole before the cut is all there is."""
    pieces = split_tokenizers.split(ANSWER.encode(), random.Random(seed))
    tokenizer = split_tokenizers.build(kind, pieces)
    # Byte fallback has no tokens for pieces that are no text: those are single bytes.
    spelt = [bytes([byte]) for byte in ANSWER.encode()] if seed == 0 else pieces
    script = tokenizer.ids(spelt)
    written = [tokenizer.tokenizer.decode(script[: end + 1]) for end in range(len(script))]
    assert written[-1] == ANSWER
    shard = ScriptedShard(
        vocab_size=tokenizer.vocab_size, num_blocks=1024, max_total_tokens=256, script=tuple(script)
    )
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    async with running(
        tmp_path,
        shard=shard,
        saved_tokenizer=tokenizer.tokenizer,
        chat_template_text=template,
        enable_prefill_logprobs=True,
    ) as router:
        num_cut = 0
        for num_tokens, text in enumerate(written, start=1):
            num_bytes = len(b"".join(tokenizer.bytes_of(token_id) for token_id in script[:num_tokens]))
            expected = ANSWER.encode()[:num_bytes].decode(errors="ignore")
            num_cut += text != expected
            for name, route in ROUTES.items():
                assert await route(router, num_tokens) == expected, (name, num_tokens)
        assert num_cut > 3
