"""What an answer must look like, in the bodies: TGI's `{"type", "value"}`, and OpenAI's `response_format`."""

from typing import Any

from msgspec import UNSET, Struct, UnsetType


class JSONGrammar(Struct, frozen=True, tag_field="type", tag="json"):
    value: Any  # JSON Schema, as an object or as text


class JSONObjectGrammar(Struct, frozen=True, tag_field="type", tag="json_object"):
    value: Any  # the same under its other name


class NamedSchema(Struct, frozen=True):
    schema: Any
    name: str | None = None


class JSONSchemaGrammar(Struct, frozen=True, tag_field="type", tag="json_schema"):
    value: NamedSchema


class RegexGrammar(Struct, frozen=True, tag_field="type", tag="regex"):
    value: str


class LarkGrammar(Struct, frozen=True, tag_field="type", tag="lark"):
    value: str  # a context-free grammar in llguidance's dialect of Lark


Grammar = JSONGrammar | JSONObjectGrammar | JSONSchemaGrammar | RegexGrammar | LarkGrammar


class TextFormat(Struct, frozen=True, tag_field="type", tag="text"):
    pass


class JSONObjectFormat(Struct, frozen=True, tag_field="type", tag="json_object"):
    value: Any | UnsetType = UNSET  # none: any object


class OpenAISchema(Struct, frozen=True):
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None  # none: any object
    strict: bool | None = None  # either way the schema is followed


class JSONSchemaFormat(Struct, frozen=True, tag_field="type", tag="json_schema"):
    value: NamedSchema | UnsetType = UNSET  # TGI's
    json_schema: OpenAISchema | UnsetType = UNSET  # OpenAI's

    def __post_init__(self) -> None:
        if (self.value is UNSET) == (self.json_schema is UNSET):
            raise ValueError("`json_schema` or `value` must be given, and not both")


ResponseFormat = TextFormat | JSONGrammar | JSONObjectFormat | JSONSchemaFormat | RegexGrammar | LarkGrammar
