"""Bodies of the KServe v2 routes."""

from typing import Annotated

from msgspec import Meta, Struct

from tgi_router.schemas.native import GenerateParameters
from tgi_router.schemas.numbers import UInt64

Byte = Annotated[int, Meta(ge=0, le=255)]


class Live(Struct, frozen=True):
    live: bool


class ServerMetadata(Struct, frozen=True):
    name: str
    version: str
    extensions: list[str]


class ModelMetadata(Struct, frozen=True):
    name: str
    version: str
    extensions: list[str]


class InferInput(Struct, frozen=True):
    name: str
    shape: list[UInt64]
    datatype: str
    data: list[Byte]  # the prompt in UTF-8


class InferOutputName(Struct, frozen=True):
    name: str


class InferBody(Struct, frozen=True, kw_only=True):
    id: str
    parameters: GenerateParameters = GenerateParameters(do_sample=True)
    inputs: list[InferInput]
    outputs: list[InferOutputName]


class InferOutput(Struct, frozen=True):
    name: str
    shape: tuple[int, int]  # 1 and the number of bytes
    datatype: str
    data: list[Byte]


class InferReply(Struct, frozen=True):
    id: str
    outputs: list[InferOutput]  # in the order of the inputs
