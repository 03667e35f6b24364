"""The checked-in stubs are those of generate.proto."""

from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

from tgi_proto import generate_pb2, generate_pb2_grpc

PROTO = Path(__file__).parents[2] / "proto"


def test_messages_are_current(tmp_path: Path) -> None:
    """Compared as descriptors, not as text: any version of the generator may be installed."""
    out = tmp_path / "descriptors"
    arguments = ["protoc", f"-Itgi_proto={PROTO}", f"--descriptor_set_out={out}", "tgi_proto/generate.proto"]
    assert protoc.main(arguments) == 0
    (expected,) = FileDescriptorSet.FromString(out.read_bytes()).file
    checked_in = FileDescriptorProto()
    generate_pb2.DESCRIPTOR.CopyToProto(checked_in)
    for message in expected.message_type:  # the generator fills json_name in only where it writes Python
        for field in message.field:
            field.ClearField("json_name")
    for message in checked_in.message_type:
        for field in message.field:
            field.ClearField("json_name")
    assert checked_in == expected, "run `make proto`"


def test_services_are_current() -> None:
    for service in generate_pb2.DESCRIPTOR.services_by_name.values():
        servicer = getattr(generate_pb2_grpc, f"{service.name}Servicer")
        for method in service.methods:
            assert hasattr(servicer, method.name), "run `make proto`"
