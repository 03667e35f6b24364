"""Chat templates: the same text as transformers' apply_chat_template, and what it leaves open."""

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_tokenizers
from tgi_router.errors import TemplateError
from tgi_router.text import chat_template
from tgi_router.text.chat_template import ChatTemplate

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{{ bos_token }}
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{{ message['content'] + eos_token }}
{% else %}
    {% continue %}
{% endif %}
{% endfor %}
"""

GEMMA = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'assistant' %}{% set role = 'model' %}
{% else %}{% set role = message['role'] %}{% endif %}
<start_of_turn>{{ role }}
{{ message['content'] | trim }}<end_of_turn>
{% endfor %}
{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'assistant' %}
<|assistant|>
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{% else %}
<|{{ message['role'] }}|>
{{ message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
<|assistant|>
{% endif %}
{% endfor %}"""

TOOLS = """{%- set ns = namespace(found=false) -%}
{%- for message in messages[::-1] -%}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {% set ns.found = true %}{% break %}
    {% endif -%}
{%- endfor -%}
{{ ns.found }}
{% for message in messages %}
  {{ message | tojson(indent=2) }}
  {{ message | tojson }}
{% endfor %}
{{ dict(a='<é & "q">') | tojson }} {{ strftime_now('%Y') }} {{ tools is none }} {{ documents is none }}"""

TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "zephyr": ZEPHYR,
    "tools": TOOLS,
}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "hi"}],
    "system": [
        {"role": "system", "content": "  be <brief> & kind "},
        {"role": "user", "content": "é 日本 🙂\n\n two"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
    ],
    "calls": [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"z": 1, "a": 2}}}
            ],
        },
        {"role": "user", "content": "and?"},
    ],
}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    folder = tiny_tokenizers.save(tmp_path_factory.mktemp("oracle"), chat_template=None)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_renders_like_transformers(source: str, messages: list[dict[str, Any]], oracle: Any) -> None:
    expected = oracle.apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=True
    )
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.render(messages) == expected


def test_the_assistant_s_last_message_is_continued() -> None:
    template = ChatTemplate(CHATML, {})
    head = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    user = {"role": "user", "content": "hi"}

    def continued(content: str) -> str:
        return template.render([user, {"role": "assistant", "content": content}])

    assert continued("hi, I am") == head + "hi, I am"  # its last occurrence
    assert continued("I am \n ") == head + "I am"
    assert continued("").endswith("<|im_start|>assistant")  # only white space at the end goes
    trimming = ChatTemplate("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}!", {})
    assert trimming.render([{"role": "assistant", "content": "  so "}]) == "<so"
    upper = ChatTemplate("{% for m in messages %}{{ m.content | upper }} {% endfor %}", {})
    assert upper.render([{"role": "assistant", "content": "so"}]) == "SO "  # not found: as it is


def test_errors_name_their_kind_and_place() -> None:
    def message(source: str) -> str:
        with pytest.raises(TemplateError) as raised:
            ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
        return str(raised.value)

    assert message("a\n{{ raise_exception('only users') }}") == (
        "Template error: syntax error: only users (in <string>:2)"
    )
    assert message("{{ missing.attribute }}").startswith(
        "Template error: undefined value: 'missing' is undefined"
    )
    assert message("{{ 1 + 'a' }}").startswith("Template error: invalid operation: ")
    assert "unsafe" in message("{{ ''.__class__.__mro__ }}")


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    find = chat_template.find_sources
    assert find(tmp_path) is None
    (tmp_path / "processor_config.json").write_text(json.dumps({"chat_template": "processor"}))
    assert find(tmp_path) == {"default": "processor"}
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert find(tmp_path) == {"tool_use": "tools", "default": "default"}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert find(tmp_path) == {"default": "json"}
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert find(tmp_path) == {"default": "jinja"}
    (tmp_path / "mine.json").write_text(json.dumps({"chat_template": "mine"}))
    assert find(tmp_path, tmp_path / "mine.json") == {"default": "mine"}


def test_a_broken_template_leaves_the_server_without_one(tmp_path: Path) -> None:
    tiny_tokenizers.save(tmp_path, chat_template="{% for %}")
    assert chat_template.load(tmp_path, None, {}) is None
    assert chat_template.load(tiny_tokenizers.save(tmp_path, chat_template=None), None, {}) is None
