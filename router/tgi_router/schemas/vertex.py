"""Bodies of /vertex, Vertex AI's predict format."""

from msgspec import Raw, Struct

from tgi_router.schemas.native import GenerateBody
from tgi_router.schemas.openai_chat import ChatBody

# Of one instance, in the order in which they are tried.
INSTANCE_BODIES = (GenerateBody, ChatBody)


class VertexBody(Struct, frozen=True):
    instances: list[Raw]


class Predictions(Struct, frozen=True):
    predictions: list[str]  # in the order of the instances
