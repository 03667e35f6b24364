"""Chat messages -> the prompt text, by the model's own Jinja template, as Hugging Face renders it.

Differences between Jinja2 and what the templates were written for are settled here: both kinds of whitespace
control on, `tojson` keeps the order of keys and escapes nothing, loops have `break` and `continue`, and
`{% generation %}` is passed through.

A template is a program that somebody else wrote. It runs in Jinja's sandbox, every turn of a loop and every
call of a macro looks at the clock, and large products are refused.
"""

import asyncio
import json
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.meta
import structlog
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from tgi_router.errors import TemplateError
from tgi_router.text.tokenizer import read_json_object

RENDER_LIMIT_S = 5.0
MAX_PRODUCT = 10_000_000  # characters, elements, or the number itself

log = structlog.get_logger(__name__)

# Gemma 3 reads the text of a system message out of a list of parts; here content is always one string.
_REWRITES = (("messages[0]['content'][0]['text']", "messages[0]['content']"),)
# Names that a message's thoughts go by; templates read the first, some the second.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

Message = Mapping[str, Any]
Sources = Mapping[str, str]  # name -> text; the one that is used when nothing is said is "default"


class ChatTemplate:
    """source: one text, or several with their names.

    special_tokens: every one is a variable of the template: bos_token, eos_token …
    """

    def __init__(
        self,
        source: str | Sources,
        special_tokens: Mapping[str, Any],
        *,
        render_limit_s: float = RENDER_LIMIT_S,
    ) -> None:
        """Raises jinja2.TemplateSyntaxError."""
        sources = {"default": source} if isinstance(source, str) else dict(source)
        self._special_tokens = dict(special_tokens)
        self._render_limit_s = render_limit_s
        self._templates: dict[str, jinja2.Template] = {}
        variables: set[str] = set()
        for name, text in sources.items():
            for written, meant in _REWRITES:
                text = text.replace(written, meant)
            environment = _environment()
            self._templates[name] = environment.from_string(text)
            variables |= jinja2.meta.find_undeclared_variables(environment.parse(text))
        self.source = "\n".join(sources.values())  # of all of them, to look for words in
        self.reads_tools = "tool_use" in sources or "tools" in variables
        self.reads_tool_calls = "tool_calls" in self.source

    @property
    def names(self) -> list[str]:
        return list(self._templates)

    async def prompt(self, messages: Sequence[Message], **options: Any) -> str:
        """`render` in a thread: nobody waits for a slow template but its own request."""
        return await asyncio.to_thread(partial(self.render, messages, **options))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        name: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. Raises TemplateError.

        name: of one of the model's templates. None: `tool_use` if there are tools and such a template, else
        the default one.
        add_generation_prompt: whether the prompt is ready for an answer; None: it is.
        continue_final_message: whether the last message goes on; None: if the assistant spoke last.
        variables: more of them for the template; they win over special tokens.
        """
        is_continued = continue_final_message
        if is_continued is None:
            is_continued = add_generation_prompt is None and _can_be_continued(messages)
        if is_continued and add_generation_prompt:
            raise TemplateError("`add_generation_prompt` and `continue_final_message` are mutually exclusive")
        if is_continued and not (messages and isinstance(messages[-1].get("content"), str)):
            raise TemplateError("`continue_final_message` needs a last message with content")
        template = self._template_named(name, has_tools=tools is not None)
        values = {**self._special_tokens, **(variables or {})}
        values |= {
            "messages": [_without_nothing(message) for message in messages],
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt is not False,
        }
        prompt = self._run(template, values)
        return _cut_after(prompt, messages[-1]["content"]) if is_continued else prompt

    def _template_named(self, name: str | None, *, has_tools: bool) -> jinja2.Template:
        if name is None:
            name = "tool_use" if has_tools and "tool_use" in self._templates else "default"
        if (template := self._templates.get(name)) is None:
            raise TemplateError(f"template not found: the model has {', '.join(sorted(self._templates))}")
        return template

    def _run(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        clock: _Clock = template.environment.extensions[_Clock.identifier]  # type: ignore[assignment]
        clock.start(self._render_limit_s)
        try:
            return template.render(values)
        except Exception as error:  # templates are programs: anything may come out of them
            raise TemplateError(_describe(error)) from error


def load(folder: Path, config_path: Path | None, special_tokens: Mapping[str, Any]) -> ChatTemplate | None:
    """The model's template, or None if it has none that can be used; a broken one is logged."""
    sources = find_sources(folder, config_path)
    if sources is None:
        log.warning("The model has no chat template: chat requests are refused")
        return None
    try:
        return ChatTemplate(sources, special_tokens)
    except jinja2.TemplateSyntaxError as error:
        log.error(
            "The chat template is broken: chat requests are refused", error=str(error), line=error.lineno
        )
        return None


def find_sources(folder: Path, config_path: Path | None = None) -> Sources | None:
    """First hit: the file that the user named, .jinja files, chat_template.json, tokenizer's and processor's
    config.
    """
    candidates: list[Callable[[], Sources | None]] = [
        lambda: _from_json(config_path) if config_path is not None else None,
        lambda: _from_jinja(folder),
        lambda: _from_json(folder / "chat_template.json"),
        lambda: _from_json(folder / "tokenizer_config.json"),
        lambda: _from_json(folder / "processor_config.json"),
    ]
    for candidate in candidates:
        if sources := candidate():
            return sources
    return None


def _from_jinja(folder: Path) -> Sources:
    """chat_template.jinja is the default; the others' names are those of their files."""
    paths = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (default := folder / "chat_template.jinja").is_file():
        paths["default"] = default
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}


def _from_json(path: Path) -> Sources | None:
    if not path.is_file():
        return None
    value = read_json_object(path).get("chat_template")
    if isinstance(value, str):
        return {"default": value}
    if not isinstance(value, list):
        return None
    named = [(entry.get("name"), entry.get("template")) for entry in value if isinstance(entry, dict)]
    return {name: template for name, template in named if isinstance(name, str) and isinstance(template, str)}


def _can_be_continued(messages: Sequence[Message]) -> bool:
    """The assistant spoke last, and in words: nothing follows a call but its result."""
    return bool(
        messages
        and messages[-1].get("role") == "assistant"
        and isinstance(messages[-1].get("content"), str)
        and not messages[-1].get("tool_calls")
    )


def _without_nothing(message: Message) -> dict[str, Any]:
    """Templates ask whether a key is there: one that is null is not. Thoughts go by every name."""
    present = {key: value for key, value in message.items() if value is not None}
    thoughts = next((present[key] for key in _REASONING_KEYS if key in present), None)
    if thoughts is None:
        return present
    return {"thinking": thoughts, **present, "reasoning_content": thoughts}


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


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`*` repeats texts and lists: what it makes must not fill the memory."""
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    _check_product(len(value) * times)
        elif isinstance(left, int) and isinstance(right, int):
            _check_product(abs(left).bit_length() * right)
        return super().call_binop(context, operator, left, right)


def _check_product(size: int) -> None:
    if size > MAX_PRODUCT:
        raise SecurityError(f"a product of {size} is too large, the limit is {MAX_PRODUCT}")


class _Clock(Extension):
    """Stops templates that run for too long: `{% __tick %}` is put into the body of every loop and macro."""

    tags = {"__tick"}  # noqa: RUF012 (jinja2's own declaration)
    _bodies = ("for", "macro", "call")

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self._state = threading.local()  # one template may be rendered in several threads

    def start(self, limit_s: float) -> None:
        """In the thread that renders."""
        self._state.deadline = time.monotonic() + limit_s

    def tick(self) -> str:
        if time.monotonic() > self._state.deadline:
            raise TimeoutError("the template takes too long")
        return ""

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        is_body = False
        previous = ""
        for token in stream:
            yield token
            if token.type == "name" and previous == "block_begin" and token.value in self._bodies:
                is_body = True
            elif token.type == "block_end" and is_body:
                is_body = False
                yield Token(token.lineno, "block_begin", "{%")
                yield Token(token.lineno, "name", "__tick")
                yield Token(token.lineno, "block_end", "%}")
            previous = token.type

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.ExprStmt(self.call_method("tick")).set_lineno(line)


class _PlainNamespace(Namespace):
    """As transformers has it: no name that begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # so that an attribute may be called `self`
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _PlainNamespace._check(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _PlainNamespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace has no attributes that begin with an underscore: {name!r}")


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Clock, _GenerationTag, LoopControlExtension]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = _PlainNamespace
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
