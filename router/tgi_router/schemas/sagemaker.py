"""The body of /invocations: one of three."""

from tgi_router.schemas.native import GenerateBody
from tgi_router.schemas.openai_chat import ChatBody
from tgi_router.schemas.openai_completions import CompletionBody

# In the order in which they are tried. No decoder can tell the three apart, so this is no msgspec union.
INVOCATION_BODIES = (GenerateBody, ChatBody, CompletionBody)
