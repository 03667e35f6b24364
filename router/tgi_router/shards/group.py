"""All shards as one: connect, warm up, send one plan to every rank, hear rank 0's result."""

import asyncio
from collections import deque
from collections.abc import Callable

from tgi_router.scheduling.plan import Masks, StepPlan, StepResult
from tgi_router.shards.client import (
    ModelFacts,
    RunStream,
    ShardClient,
    ShardsLost,
    WarmupSizes,
    decode_result,
    encode_masks,
    encode_plan,
)

INFO_TIMEOUT_S = 10.0
WARMUP_TIMEOUT_S = 600.0  # the largest step, on the slowest device


class ShardGroup:
    """Addresses of all ranks, rank 0 first. Connections are made anew after every loss."""

    def __init__(self, addresses: list[str]) -> None:
        self.addresses = addresses
        self._clients: list[ShardClient] = []

    async def connect(self, sizes: WarmupSizes) -> ModelFacts:
        """One attempt to reach every rank and make it ready. Raises ShardsLost."""
        await self.close()
        self._clients = [ShardClient(address) for address in self.addresses]
        infos = await asyncio.gather(*(client.info(INFO_TIMEOUT_S) for client in self._clients))
        for rank, info in enumerate(infos):
            if (info.rank, info.world_size) != (rank, len(infos)):
                raise ShardsLost(
                    f"{self.addresses[rank]} is rank {info.rank} of {info.world_size}, "
                    f"expected {rank} of {len(infos)}"
                )
        warmups = await asyncio.gather(*(client.warmup(sizes, WARMUP_TIMEOUT_S) for client in self._clients))
        healths = await asyncio.gather(*(client.health(INFO_TIMEOUT_S) for client in self._clients))
        return ModelFacts(
            model_type=infos[0].model_type,
            dtype=infos[0].dtype,
            device_type=infos[0].device_type,
            vocab_size=infos[0].vocab_size,
            max_position_embeddings=infos[0].max_position_embeddings,
            eos_token_ids=frozenset(infos[0].eos_token_ids),
            world_size=len(infos),
            num_blocks=min(warmup.num_blocks for warmup in warmups),
            block_size=warmups[0].block_size,
            max_total_tokens=min(warmup.max_total_tokens for warmup in warmups),
            blocks_are_states=warmups[0].blocks_are_states,
            longest_step_s=max(health.longest_step_s for health in healths),
            decoder_start_token_ids=tuple(infos[0].decoder_start_token_ids),
        )

    def open(self, wake: Callable[[], None]) -> "GroupStream":
        return GroupStream([client.run() for client in self._clients], wake)

    async def close(self) -> None:
        clients, self._clients = self._clients, []
        await asyncio.gather(*(client.close() for client in clients))


class GroupStream:
    """One `Run` stream a rank. `wake` is called whenever `results` or `lost` has changed."""

    def __init__(self, streams: list[RunStream], wake: Callable[[], None]) -> None:
        self.results: deque[StepResult] = deque()
        self.lost: ShardsLost | None = None
        self._streams = streams
        self._wake = wake
        self._readers = [asyncio.create_task(self._read(rank)) for rank in range(len(streams))]

    async def send(self, plan: StepPlan) -> None:
        """Raises ShardsLost."""
        await self._send(encode_plan(plan))

    async def send_masks(self, masks: Masks) -> None:
        """For a plan that awaits them. Raises ShardsLost."""
        await self._send(encode_masks(masks))

    async def _send(self, data: bytes) -> None:
        if len(self._streams) == 1:
            await self._streams[0].send(data)
        else:
            await asyncio.gather(*(stream.send(data) for stream in self._streams))

    async def close(self) -> None:
        for stream in self._streams:
            stream.cancel()
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    async def _read(self, rank: int) -> None:
        stream = self._streams[rank]
        try:
            while True:
                data = await stream.receive()
                if (
                    rank == 0
                ):  # the other ranks only acknowledge: hearing them is how we notice that they are gone
                    self.results.append(decode_result(data))
                    self._wake()
        except ShardsLost as error:
            self.lost = self.lost or error
            self._wake()
