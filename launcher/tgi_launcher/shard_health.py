"""Asks a shard how it is, over gRPC. The only launcher file that knows tgi_proto."""

import os
from pathlib import Path

from tgi_launcher.stalls import Health

# Our children become other programs at once. Where gRPC is prepared for forks, each start of a child disturbs
# its threads and writes to stderr. It reads the variable when it is imported; our children get the old one.
_FORK_SUPPORT = "GRPC_ENABLE_FORK_SUPPORT"
_inherited = os.environ.get(_FORK_SUPPORT)
os.environ[_FORK_SUPPORT] = "0"

from grpc import aio  # noqa: E402  # see above

from tgi_proto import generate_pb2 as pb  # noqa: E402
from tgi_proto import generate_pb2_grpc as pb_grpc  # noqa: E402

if _inherited is None:
    del os.environ[_FORK_SUPPORT]
else:
    os.environ[_FORK_SUPPORT] = _inherited

CHANNEL_OPTIONS = (
    # Shards that were restarted listen on the same path: each channel has a connection of its own.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class ShardHealth:
    def __init__(self, socket_path: Path) -> None:
        self._channel = aio.insecure_channel(f"unix:{socket_path}", options=CHANNEL_OPTIONS)
        self._stub = pb_grpc.TextGenerationStub(self._channel)  # type: ignore[no-untyped-call]  # generated

    async def ask(self, timeout_s: float) -> Health | None:
        """None: no answer within `timeout_s`."""
        try:
            answer: pb.HealthResponse = await self._stub.Health(pb.HealthRequest(), timeout=timeout_s)
        except aio.AioRpcError:
            return None
        return Health(answer.last_step_id, answer.current_step_age_s, answer.longest_step_s)

    async def close(self) -> None:
        await self._channel.close(grace=None)
