"""Templates in the manner of published models, rendered as transformers renders them: text or error."""

# ruff: noqa: E501, RUF001 (templates keep their lines, and their own vertical bars)

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_tokenizers
from tgi_router.errors import TemplateError
from tgi_router.text import chat_template
from tgi_router.text.chat_template import ChatTemplate

CHATML = """{% if not messages or messages[0].role != 'system' %}<|im_start|>system
You help.<|im_end|>
{% endif %}
{% for m in messages %}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" }}
{%- if tools is not none %}
    {{- 'Respond with {"name": function name, "parameters": dictionary of argument name and its value}.\\n' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role in ['ipython', 'tool'] or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model makes one call at a time") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

MISTRAL = """{%- set loop_messages = messages | selectattr('role', 'ne', 'system') | list %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages if not (message.role == "tool" or message.tool_calls is defined) %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("Roles must alternate user and assistant") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- endif %}
            {%- endfor %}
            {{- "] [/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + " [/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Ids of calls have 9 characters") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{% else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] in ("tool_results", "tool") %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if (message['role'] == 'assistant') %}
        {% set role = 'model' %}
    {% else %}
        {% set role = message['role'] %}
    {% endif %}
{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}"""

PHI = """{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'user' %}{{'<|user|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>
' + (message['content'] or '') + '<|end|>
'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}"""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ '<|assistant|>
'  + (message['content'] or '') + eos_token }}{% endgeneration %}

{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

COMMAND_R = """{{ bos_token }}{% set loop_messages = messages %}
{%- macro turn(role, text) -%}
<|START_OF_TURN_TOKEN|><|{{ role | upper }}_TOKEN|>{{ text }}<|END_OF_TURN_TOKEN|>
{%- endmacro -%}
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{{ turn('system', messages[0]['content']) }}{% endif %}
{%- for message in loop_messages %}{{ turn({'user': 'user', 'assistant': 'chatbot'}.get(message.role, 'system'), message.content or '') }}{% endfor %}
{%- if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"""

COMMAND_R_TOOLS = """{% set types = {'string': 'str', 'integer': 'int', 'object': 'Dict'} %}
{{ bos_token }}## Tools
{% for tool in tools %}
{% if loop.index0 != 0 %}{{ '\\n\\n' }}{% endif %}
def {{ tool.function.name }}(
{%- for name, fields in tool.function.parameters.properties.items() %}
{% if loop.index0 != 0 %}, {% endif %}{{ name }}: {{ types[fields.type] or 'Any' }}
{%- if name not in tool.function.parameters.required %} = None{% endif %}
{%- endfor %}):
    {{ tool.function.description }}
{%- endfor %}
{% for message in messages %}
{% if message.tool_calls %}
Action: {{ message.tool_calls | map(attribute='function') | list | tojson(indent=2) }}
{% else %}{{ message.role | capitalize }}: {{ message.content }}
{% endif %}
{% endfor %}"""

COMMAND_R_RAG = """{{ bos_token }}{% for document in documents %}Document: {{ loop.index0 }}
{% for key, value in document.items() %}{{ key }}: {{ value }}
{% endfor %}{% endfor %}{{ messages[-1].content }}"""

DEEPSEEK = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(is_first=false, is_tool=false, system_prompt='') %}
{%- for message in messages %}{%- if message['role'] == 'system' %}{%- set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}
{{- bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}
{%- if message['role'] == 'assistant' and 'tool_calls' in message %}
{%- for tool in message['tool_calls'] %}<｜tool▁call▁begin｜>{{ tool['type'] }}<｜tool▁sep｜>{{ tool['function']['name'] }}
```json
{{ tool['function']['arguments'] | tojson }}
```<｜tool▁call▁end｜>{% endfor %}
{%- elif message['role'] == 'assistant' %}
{%- set content = message['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}<｜Assistant｜>{{ content }}<｜end▁of▁sentence｜>
{%- endif %}
{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}<｜tool▁output▁begin｜>{{ message['content'] }}<｜tool▁output▁end｜>{%- endif %}
{%- endfor -%}
{% if add_generation_prompt and not ns.is_tool %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nReturn <tool_call>\\n{\\"name\\": <name>, \\"arguments\\": <object>}\\n</tool_call><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = message.reasoning_content or '' %}
        {{- '<|im_start|>' + message.role }}
        {%- if loop.index0 > ns.last_query_index and reasoning_content %}
            {{- '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

HERMES = """{%- macro type_of(spec) -%}
{%- set basic = {"string": "str", "number": "float", "integer": "int", "boolean": "bool"} -%}
{%- if basic[spec.type] is defined -%}{{ basic[spec.type] }}
{%- elif spec.type == "array" -%}list[{{ type_of(spec['items']) }}]
{%- elif spec.type == "object" -%}dict
{%- elif spec.type is iterable and spec.type is not string -%}Union[{{ spec.type | join(',') }}]
{%- else -%}Any{%- endif -%}
{%- endmacro -%}
{{- bos_token }}{{- "<|im_start|>system\\nTools: <tools> " }}
{%- for tool in (tools or []) %}
{%- if tool.function is defined %}{%- set tool = tool.function %}{%- endif %}
{{- '{"name": "' + tool.name + '(' }}
{%- for name, spec in tool.parameters.properties|items %}{{ name }}: {{ type_of(spec) }}{% if not loop.last %}, {% endif %}{% endfor %}
{{- ')"' }}
{%- if tool.parameters.properties | length == 0 %}{{ ", {}" }}{% else %}, {{ tool.parameters|tojson }}{% endif %}
{{- "}" }}{%- if not loop.last %}{{ "\\n" }}{% endif %}
{%- endfor %}
{{- " </tools><|im_end|>\\n" }}
{%- for message in messages %}
{%- if message.role == "tool" %}<tool_response>
{{ message.content }}{{ '\\n</tool_response>' if loop.last else '' }}
{%- elif message.tool_calls is defined %}
{%- for call in message.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}
{%- else %}{{ message.role }}: {{ message.content }}{% endif %}
{%- endfor %}"""

GRANITE = """{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set system_message = "Today's year: " + strftime_now('%Y') + "." %}
{%- if tools and documents %}{%- set system_message = system_message + " Tools and documents." %}{%- elif tools %}{%- set system_message = system_message + " Tools." %}{%- endif %}
{%- set loop_messages = messages %}{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}
{%- if tools %}{{- '<|start_of_role|>tools<|end_of_role|>' }}{{- tools | tojson(indent=4) }}{{- '<|end_of_text|>\\n' }}{%- endif %}
{%- if documents %}{{- '<|start_of_role|>documents<|end_of_role|>' }}
{%- for document in documents %}{{- 'Document ' + loop.index0 | string + '\\n' }}{{- document['text'] }}{%- if not loop.last %}{{- '\\n\\n' }}{%- endif %}{%- endfor %}{%- endif %}
{%- for message in loop_messages %}
{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + (message['content'] | default('', true)) + '<|end_of_text|>\\n' }}
{%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant' }}{%- if controls %}{{- ' ' + controls | tojson()}}{%- endif %}{{- '<|end_of_role|>' }}{%- endif %}
{%- endfor %}"""

SMOLLM = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are small.<|im_end|>
' }}{% endif %}{% if message.role == 'tool' %}{% continue %}{% endif %}{{'<|im_start|>' + message['role'] + '
' + (message['content'] or '<none>') + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}{{ unk_token }}{{ pad_token is defined }}{{ sep_token }}{{ cls_token is defined }}"""

TEMPLATES: dict[str, str | dict[str, str]] = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "phi": PHI,
    "zephyr": ZEPHYR,
    "command_r": {"default": COMMAND_R, "tool_use": COMMAND_R_TOOLS, "rag": COMMAND_R_RAG},
    "deepseek": DEEPSEEK,
    "qwen3": QWEN3,
    "hermes": {"default": CHATML, "tool_use": HERMES},
    "granite": GRANITE,
    "smollm": SMOLLM,
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wetter für <Städte> & 'Orte'",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "東京 …"},
                "days": {"type": "array", "items": {"type": "integer"}},
                "unit": {"type": ["string", "null"], "enum": ["C", "F", None]},
            },
            "required": ["city"],
        },
    },
}
NOTHING = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}


def call(arguments: Any, call_id: str = "abcdefghi") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


USER = {"role": "user", "content": "  Wie ist das Wetter in <東京>? 🌧\n"}
SYSTEM = {"role": "system", "content": " kurz & knapp "}
ANSWER = {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": '{"t": 3}'}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [
        SYSTEM,
        USER,
        {"role": "assistant", "content": " gut. "},
        {"role": "user", "content": "{{ 1 }}"},
    ],
    "thoughts": [
        USER,
        {"role": "assistant", "content": "<think>hm</think>ja", "reasoning_content": "hm"},
        USER,
    ],
    "call": [
        USER,
        {"role": "assistant", "tool_calls": [call({"city": "東京", "days": [1], "a": None})]},
        ANSWER,
    ],
    "null content": [USER, {"role": "assistant", "content": None, "tool_calls": [call({})]}, ANSWER],
    "empty content": [USER, {"role": "assistant", "content": "", "tool_calls": [call({})]}, ANSWER, ANSWER],
    "arguments as text": [USER, {"role": "assistant", "content": "", "tool_calls": [call('{"city": "a"}')]}],
    "two calls": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call({}), call({}, "x")]},
        ANSWER,
    ],
    "twice the user": [USER, USER],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tools": {"tools": [WEATHER, NOTHING]},
    "documents": {"documents": [{"title": "A", "text": "é"}, {"title": "B", "text": "<b>"}]},
    "variables": {
        "variables": {"enable_thinking": False, "controls": {"length": "short"}, "date_string": "now"}
    },
    "no prompt": {"add_generation_prompt": False},
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<|end|>", "sep_token": "<sep>"}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    folder = tiny_tokenizers.save(tmp_path_factory.mktemp("oracle"), chat_template=None)
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **SPECIAL)


def theirs(oracle: Any, source: Any, messages: list[dict[str, Any]], options: dict[str, Any]) -> str | None:
    """None: an error."""
    oracle.chat_template = source
    options = {"add_generation_prompt": True, **options}
    options["chat_template"] = options.pop("name", None)
    options |= options.pop("variables", {})
    try:
        return str(oracle.apply_chat_template(messages, tokenize=False, **options))
    except Exception:  # whatever a template makes of what it does not expect
        return None


def ours(template: ChatTemplate, messages: list[dict[str, Any]], options: dict[str, Any]) -> str | None:
    options = {"add_generation_prompt": True, **options}
    try:
        return template.render(messages, **options)
    except TemplateError:
        return None


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_like_transformers(name: str, oracle: Any) -> None:
    source, num_texts = TEMPLATES[name], 0
    template = ChatTemplate(source, SPECIAL)
    for messages in CONVERSATIONS.values():
        for options in OPTIONS.values():
            expected = theirs(oracle, source, messages, options)
            assert ours(template, messages, options) == expected, (messages, options)
            num_texts += expected is not None
    assert num_texts >= 10


def test_templates_have_names(oracle: Any) -> None:
    source, messages = TEMPLATES["command_r"], CONVERSATIONS["user"]
    rag = OPTIONS["documents"] | {"name": "rag"}
    text = ours(ChatTemplate(source, SPECIAL), messages, rag)
    assert text == theirs(oracle, source, messages, rag)
    assert text is not None
    assert "title: A" in text
    with pytest.raises(TemplateError, match="template not found: the model has default, rag, tool_use"):
        ChatTemplate(source, SPECIAL).render(messages, name="other")
    assert ChatTemplate(source, {}).reads_tools
    assert not ChatTemplate(CHATML, {}).reads_tools
    assert ChatTemplate(LLAMA3, {}).reads_tools


def test_files_of_templates(tmp_path: Path, oracle: Any) -> None:
    """As transformers saves them, and reads them again."""
    oracle.chat_template = TEMPLATES["command_r"]
    oracle.save_pretrained(tmp_path)
    assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").is_file()
    found = chat_template.find_sources(tmp_path)
    assert found == TEMPLATES["command_r"]
    template = chat_template.load(tmp_path, None, SPECIAL)
    assert template is not None
    tools = OPTIONS["tools"]
    assert template.render([USER], **tools) == theirs(oracle, TEMPLATES["command_r"], [USER], tools)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
        "{{ 'x' * 99999999999 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set ns = namespace(x=[[]] * 1000) %}{{ ns.x * 100000 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_cannot_run_away(source: str) -> None:
    with pytest.raises(TemplateError, match=r"too long|too large|recursion"):
        ChatTemplate(source, {}, render_limit_s=0.1).render([USER])


async def test_a_slow_template_runs_beside_the_event_loop() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m | tojson }}{% endfor %}", {})
    assert json.loads(await template.prompt([USER])) == USER
