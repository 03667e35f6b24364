"""A shard without a model: it keeps the step contract, checks that the router does, and computes nothing.

The next token is a function of all tokens before it. A slot of the "KV cache" holds a digest of the prefix
that it was computed from; every sampling step reads the whole context back through the block table and
compares. So a block that was granted twice, overwritten, shared too early or lost shows at once, and a
resumed stream can be compared with an undisturbed one token by token. With a mask the choice is among the
tokens that it allows.
"""

import asyncio
import functools
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

import grpc
from grpc import aio

from tgi_proto import generate_pb2 as pb
from tgi_proto import generate_pb2_grpc as pb_grpc


def extend_digest(digest: int, token_id: int) -> int:
    return hash((digest, token_id))  # of integers: the same in every process


def digest_of(token_ids: Iterable[int]) -> int:
    return functools.reduce(extend_digest, token_ids, 0)


def next_token(token_ids: list[int], vocab_size: int, mask: bytes | None = None) -> int:
    return next_token_after(digest_of(token_ids), vocab_size, mask)


def next_token_after(digest: int, vocab_size: int, mask: bytes | None = None) -> int:
    """digest: of all tokens so far."""
    if mask is None:
        return digest % vocab_size
    allowed = [token_id for token_id in range(vocab_size) if mask[token_id // 8] >> token_id % 8 & 1]
    return allowed[digest % len(allowed)]


class ScriptedSequence:
    def __init__(
        self,
        token_ids: Iterable[int],
        num_prompt_tokens: int,
        prompt_logprobs: bool,
        top_n_tokens: int,
        num_computed: int,
    ) -> None:
        self.token_ids: list[int] = []
        self.digests: list[int] = []  # of each prefix; the last one of all tokens
        self.num_prompt_tokens = num_prompt_tokens
        self.prompt_logprobs = prompt_logprobs
        self.top_n_tokens = top_n_tokens
        self.num_computed = num_computed
        self.block_ids: list[int] = []
        for token_id in token_ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        self.digests.append(extend_digest(self.digests[-1] if self.digests else 0, token_id))
        self.token_ids.append(token_id)


@dataclass
class ScriptedShard:
    num_blocks: int = 64
    block_size: int = 4
    vocab_size: int = 256
    max_total_tokens: int = 128
    eos_token_ids: tuple[int, ...] = ()
    max_position_embeddings: int = 0
    world_size: int = 1
    rank: int = 0
    max_step_tokens: int = 0
    max_sequences: int = 0
    num_steps: int = 0
    num_masks: int = 0
    script: tuple[int, ...] = ()  # what every sequence says first

    def __post_init__(self) -> None:
        self.forget()
        self.kv: dict[int, int] = {}

    def forget(self) -> None:
        self.sequences: dict[int, ScriptedSequence] = {}
        self.last_step_id = 0

    def apply(self, plan: pb.StepPlan, masks: pb.Masks | None = None) -> pb.StepResult:
        assert plan.step_id == self.last_step_id + 1
        assert plan.await_masks == (masks is not None)
        self.masks = {} if masks is None else self._masks(masks)
        self.num_masks += len(self.masks)
        self.last_step_id = plan.step_id
        self.num_steps += 1
        for sequence_id in plan.drop_sequence_ids:
            del self.sequences[sequence_id]
        for added in plan.add:
            self._add(added)
        assert len(self.sequences) <= self.max_sequences
        assert sum(plan.run_num_tokens) <= self.max_step_tokens
        assert len(set(plan.run_sequence_ids)) == len(plan.run_sequence_ids)
        result = pb.StepResult(step_id=plan.step_id, forward_ns=1000, sample_ns=100, total_ns=1100)
        new_block_ids = iter(plan.new_block_ids)
        rows = zip(plan.run_sequence_ids, plan.run_num_tokens, plan.run_num_new_blocks, strict=True)
        for sequence_id, num_tokens, num_new_blocks in rows:
            sequence = self.sequences[sequence_id]
            for _ in range(num_new_blocks):
                block_id = next(new_block_ids)
                assert 0 <= block_id < self.num_blocks
                sequence.block_ids.append(block_id)
            self._run(sequence_id, sequence, num_tokens, result)
        assert next(new_block_ids, None) is None
        return result

    def _masks(self, masks: pb.Masks) -> dict[int, bytes]:
        row_bytes = -(-self.vocab_size // 32) * 4
        assert len(masks.bits) == row_bytes * len(masks.sequence_ids)
        return {
            sequence_id: masks.bits[row * row_bytes : (row + 1) * row_bytes]
            for row, sequence_id in enumerate(masks.sequence_ids)
        }

    def _add(self, added: pb.AddSequence) -> None:
        assert added.sequence_id not in self.sequences
        token_ids = [*added.prompt_token_ids, *added.output_token_ids]
        assert added.num_cached_tokens < len(token_ids)
        assert not (added.prompt_logprobs and added.num_cached_tokens)
        self.sequences[added.sequence_id] = ScriptedSequence(
            token_ids,
            len(added.prompt_token_ids),
            added.prompt_logprobs,
            added.top_n_tokens,
            added.num_cached_tokens,
        )

    def _run(
        self, sequence_id: int, sequence: ScriptedSequence, num_tokens: int, result: pb.StepResult
    ) -> None:
        assert num_tokens >= 1
        start, end = sequence.num_computed, sequence.num_computed + num_tokens
        assert end <= len(sequence.token_ids)
        assert end <= len(sequence.block_ids) * self.block_size
        written = sequence.block_ids[start // self.block_size : (end - 1) // self.block_size + 1]
        for other_id, other in self.sequences.items():
            if other_id != sequence_id:
                assert not set(written).intersection(other.block_ids), "a shared block is written"
        for position in range(start, end):
            self.kv[self._slot(sequence, position)] = sequence.digests[position]
        sequence.num_computed = end
        if sequence.prompt_logprobs and start < sequence.num_prompt_tokens:
            first, last = max(start, 1), min(end, sequence.num_prompt_tokens)
            result.prompt_logprobs.append(
                pb.PromptLogprobs(
                    sequence_id=sequence_id,
                    start_position=first,
                    logprobs=[-float(p) for p in range(first, last)],
                )
            )
        if end < len(sequence.token_ids):
            return
        for position in range(end):  # "attention": everything before must be there
            slot = self._slot(sequence, position)
            assert self.kv[slot] == sequence.digests[position], "stale KV was read"
        num_output = len(sequence.token_ids) - sequence.num_prompt_tokens
        if num_output < len(self.script):
            token_id = self.script[num_output]
        else:
            mask = self.masks.get(sequence_id)
            token_id = next_token_after(sequence.digests[-1], self.vocab_size, mask)
        sequence.append(token_id)
        result.sequence_ids.append(sequence_id)
        result.token_ids.append(token_id)
        result.logprobs.append(-0.5)
        result.num_top_tokens.append(sequence.top_n_tokens)
        for i in range(sequence.top_n_tokens):
            result.top_token_ids.append((token_id + i) % self.vocab_size)
            result.top_logprobs.append(-0.5 - i)

    def _slot(self, sequence: ScriptedSequence, position: int) -> int:
        return sequence.block_ids[position // self.block_size] * self.block_size + position % self.block_size


class ScriptedService(pb_grpc.TextGenerationServicer):
    """A scripted shard behind real gRPC."""

    def __init__(self, shard: ScriptedShard, step_s: float = 0.0) -> None:
        self.shard = shard
        self.step_s = step_s  # how long a step takes
        self.max_tokens_in_memory: int | None = None  # a step of more tokens runs out of memory

    async def Info(self, request: pb.InfoRequest, context: object) -> pb.InfoResponse:
        return pb.InfoResponse(
            model_type="scripted",
            dtype="float32",
            device_type="cpu",
            vocab_size=self.shard.vocab_size,
            max_position_embeddings=self.shard.max_position_embeddings,
            eos_token_ids=self.shard.eos_token_ids,
            world_size=self.shard.world_size,
            rank=self.shard.rank,
        )

    async def Health(self, request: pb.HealthRequest, context: object) -> pb.HealthResponse:
        return pb.HealthResponse(last_step_id=self.shard.last_step_id)

    async def Warmup(self, request: pb.WarmupRequest, context: object) -> pb.WarmupResponse:
        self.shard.forget()
        self.shard.max_step_tokens = request.max_step_tokens
        self.shard.max_sequences = request.max_sequences
        return pb.WarmupResponse(
            num_blocks=self.shard.num_blocks,
            block_size=self.shard.block_size,
            max_total_tokens=request.max_total_tokens or self.shard.max_total_tokens,
        )

    async def Run(
        self, requests: AsyncIterator[pb.RunRequest], context: aio.ServicerContext
    ) -> AsyncIterator[pb.StepResult]:
        self.shard.forget()
        plans: deque[pb.StepPlan] = deque()
        masks: dict[int, pb.Masks] = {}
        async for request in requests:
            started_at = time.monotonic()
            if request.HasField("masks"):
                masks[request.masks.step_id] = request.masks
            else:
                plans.append(request.plan)
            while plans and (not plans[0].await_masks or plans[0].step_id in masks):
                plan = plans.popleft()
                if sum(plan.run_num_tokens) > (self.max_tokens_in_memory or sum(plan.run_num_tokens)):
                    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "OutOfMemoryError")
                result = self.shard.apply(plan, masks.pop(plan.step_id, None))
                await asyncio.sleep(max(0.0, self.step_s - (time.monotonic() - started_at)))
                yield result if self.shard.rank == 0 else pb.StepResult(step_id=plan.step_id)


async def start_server(service: ScriptedService, address: str) -> aio.Server:
    server = aio.server()
    pb_grpc.add_TextGenerationServicer_to_server(service, server)
    server.add_insecure_port(address)
    await server.start()
    return server
