"""Chat messages -> the prompt text, by the model's own Jinja template, as Hugging Face renders it.

Differences between Jinja2 and what the templates were written for are settled here: both kinds of whitespace
control on, `tojson` keeps the order of keys and escapes nothing, loops have `break` and `continue`, and
`{% generation %}` is passed through.
"""

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import structlog
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tgi_router.errors import TemplateError
from tgi_router.text.tokenizer import read_json_object

log = structlog.get_logger(__name__)

# Gemma 3 reads the text of a system message out of a list of parts; here content is always one string.
_REWRITES = (("messages[0]['content'][0]['text']", "messages[0]['content']"),)


class ChatTemplate:
    """special_tokens: every one is a variable of the template: bos_token, eos_token …"""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        """Raises jinja2.TemplateSyntaxError."""
        for written, meant in _REWRITES:
            source = source.replace(written, meant)
        self._template = _environment().from_string(source)
        self._special_tokens = {"bos_token": None, "eos_token": None} | dict(special_tokens)
        self.reads_tool_calls = "tool_calls" in source

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt, ready for the answer; if the assistant spoke last, it goes on from there.

        Raises TemplateError.
        """
        try:
            prompt = self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except Exception as error:  # templates are programs: anything may come out of them
            raise TemplateError(_describe(error)) from error
        if messages and messages[-1]["role"] == "assistant":
            prompt = _cut_after(prompt, messages[-1]["content"])
        return prompt


def load(folder: Path, config_path: Path | None, special_tokens: Mapping[str, Any]) -> ChatTemplate | None:
    """The model's template, or None if it has none that can be used; a broken one is logged."""
    source = find_source(folder, config_path)
    if source is None:
        log.warning("The model has no chat template: chat requests are refused")
        return None
    try:
        return ChatTemplate(source, special_tokens)
    except jinja2.TemplateSyntaxError as error:
        log.error(
            "The chat template is broken: chat requests are refused", error=str(error), line=error.lineno
        )
        return None


def find_source(folder: Path, config_path: Path | None = None) -> str | None:
    """First hit: the file that the user named, chat_template.jinja, .json, tokenizer's and processor's
    config.
    """
    jinja = folder / "chat_template.jinja"
    candidates: list[Callable[[], str | None]] = [
        lambda: _from_json(config_path) if config_path is not None else None,
        lambda: jinja.read_text(encoding="utf-8") if jinja.is_file() else None,
        lambda: _from_json(folder / "chat_template.json"),
        lambda: _from_json(folder / "tokenizer_config.json"),
        lambda: _from_json(folder / "processor_config.json"),
    ]
    for candidate in candidates:
        if (source := candidate()) is not None:
            return source
    return None


def _from_json(path: Path) -> str | None:
    if not path.is_file():
        return None
    value = read_json_object(path).get("chat_template")
    if isinstance(value, list):  # named templates
        value = next((entry.get("template") for entry in value if entry.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def _cut_after(prompt: str, content: str) -> str:
    """Everything up to the end of the last message's own text: the model continues it."""
    for text in (content, content.strip()):  # templates like to trim
        if text and (start := prompt.rfind(text)) >= 0:
            return prompt[: start + len(text)].rstrip()
    return prompt if content.strip() else prompt.rstrip()


def _describe(error: Exception) -> str:
    """In the words of the contract: kind, detail, place."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    place = f"(in <string>:{frames[-1].lineno})" if frames else "(in <string>)"
    match error:
        case _Raised():
            kind = "syntax error"  # what TGI's engine calls it
        case jinja2.UndefinedError():
            kind = "undefined value"
        case jinja2.TemplateError():
            kind = "syntax error"
        case _:
            kind = "invalid operation"
    return f"{kind}: {error} {place}"


class _Raised(jinja2.TemplateError):
    """The template called raise_exception."""


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, LoopControlExtension]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _raise(message: str) -> NoReturn:
    raise _Raised(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; to us its content is all that counts."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
