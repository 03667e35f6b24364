"""The grammar of a body, in whichever of its forms -> what is asked for."""

from msgspec import UNSET

from tgi_router.grammar.source import AskedGrammar
from tgi_router.schemas.grammar import (
    Grammar,
    JSONObjectFormat,
    JSONSchemaFormat,
    JSONSchemaGrammar,
    LarkGrammar,
    RegexGrammar,
    ResponseFormat,
    TextFormat,
)

ANY_OBJECT = {"type": "object"}


def asked_grammar(asked: Grammar | ResponseFormat | None) -> AskedGrammar | None:
    """None: any text will do."""
    match asked:
        case None | TextFormat():
            return None
        case RegexGrammar(value):
            return AskedGrammar("regex", value)
        case LarkGrammar(value):
            return AskedGrammar("lark", value)
        case JSONSchemaGrammar(named):
            return AskedGrammar("json", named.schema, needs_properties=True)
        case JSONSchemaFormat(value, json_schema):
            if value is not UNSET:
                return AskedGrammar("json", value.schema, needs_properties=True)
            assert json_schema is not UNSET
            return AskedGrammar("json", ANY_OBJECT if json_schema.schema is None else json_schema.schema)
        case JSONObjectFormat(value) if value is UNSET:
            return AskedGrammar("json", ANY_OBJECT)
        case _:
            return AskedGrammar("json", asked.value, needs_properties=True)
