"""One shard over gRPC: plans and results <-> generate.proto. The only router file that knows tgi_proto."""

import asyncio
from dataclasses import dataclass
from itertools import islice

import grpc
from grpc import aio

from tgi_proto import generate_pb2 as pb
from tgi_proto import generate_pb2_grpc as pb_grpc
from tgi_router.request import SampledToken
from tgi_router.scheduling.plan import AddedSequence, Failure, Masks, PromptLogprobs, StepPlan, StepResult

REFUSALS = {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED}  # of a warm-up
RUN_METHOD = "/tgi.v1.TextGeneration/Run"

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A restarted shard listens on the same path: a fresh connection each time, retried at once.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),  # gRPC takes nothing shorter
    ("grpc.max_reconnect_backoff_ms", 100),
)


class ShardsLost(Exception):
    """A shard does not answer any more, or not as it should; what it held is gone."""

    def __init__(self, reason: str, *, is_out_of_memory: bool = False) -> None:
        super().__init__(reason)
        self.is_out_of_memory = is_out_of_memory  # a step was, and said so


class WarmupRefused(ShardsLost):
    """A shard is there, and says that it cannot serve as it is asked to."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the shards told about the model and their memory. One for the whole group."""

    model_type: str
    dtype: str
    device_type: str
    vocab_size: int
    max_position_embeddings: int  # 0: no limit of its own
    eos_token_ids: frozenset[int]
    world_size: int
    num_blocks: int
    block_size: int
    max_total_tokens: int  # longest sequence, prompt and output
    longest_step_s: float = 0.0  # so far, the warm-up's steps among them
    blocks_are_states: bool = False  # one block a sequence, however long; prefixes cannot be shared
    decoder_start_token_ids: tuple[int, ...] = ()  # they end every prompt; none: the model has no encoder

    def usable_blocks(self, max_kv_tokens: int | None) -> int:
        """The blocks that plans may name if the user caps the tokens in them."""
        if max_kv_tokens is None:
            return self.num_blocks
        num_blocks = min(self.num_blocks, max_kv_tokens // self.block_size)
        # The first state is there whatever the cap: then it is the cap that a sequence must not outgrow.
        return max(num_blocks, 1) if self.blocks_are_states else num_blocks

    def usable_tokens(self, max_kv_tokens: int | None) -> int:
        """How many tokens the KV cache holds: whole blocks, and no more than the user allows."""
        num_tokens = self.usable_blocks(max_kv_tokens) * self.block_size
        return num_tokens if max_kv_tokens is None else min(num_tokens, max_kv_tokens)

    @property
    def has_encoder(self) -> bool:
        """Whether prompts are read as wholes, each for its own answer alone."""
        return bool(self.decoder_start_token_ids)

    @property
    def takes_images(self) -> bool:
        """Whether `![](...)` in a prompt is an image to the model, and not text."""
        return self.model_type in ("gemma3", "llama4", "mistral3")


@dataclass(frozen=True, slots=True)
class WarmupSizes:
    max_step_tokens: int
    max_total_tokens: int  # 0: the shards decide
    max_sequences: int


class ShardClient:
    def __init__(self, address: str) -> None:
        self.address = address  # "unix:/path" or "host:port"
        self._channel = aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = pb_grpc.TextGenerationStub(self._channel)

    async def info(self, timeout_s: float) -> pb.InfoResponse:
        try:
            return await self._stub.Info(pb.InfoRequest(), timeout=timeout_s, wait_for_ready=True)
        except aio.AioRpcError as error:
            raise ShardsLost(describe(error)) from error

    async def health(self, timeout_s: float) -> pb.HealthResponse:
        try:
            return await self._stub.Health(pb.HealthRequest(), timeout=timeout_s)
        except aio.AioRpcError as error:
            raise ShardsLost(describe(error)) from error

    async def warmup(self, sizes: WarmupSizes, timeout_s: float) -> pb.WarmupResponse:
        request = pb.WarmupRequest(
            max_step_tokens=sizes.max_step_tokens,
            max_total_tokens=sizes.max_total_tokens,
            max_sequences=sizes.max_sequences,
        )
        try:
            return await self._stub.Warmup(request, timeout=timeout_s)
        except aio.AioRpcError as error:
            if error.code() in REFUSALS:
                raise WarmupRefused(str(error.details())) from error
            raise ShardsLost(describe(error)) from error

    def run(self) -> "RunStream":
        # The same bytes go to every rank: they are serialised once, by encode_…, and sent as they are.
        method = self._channel.stream_stream(RUN_METHOD, request_serializer=None, response_deserializer=None)
        return RunStream(method())  # type: ignore[call-arg]  # no iterator: plans are written one by one

    async def close(self) -> None:
        await self._channel.close(grace=None)


class RunStream:
    """The stream of plans and masks to one shard and of results back."""

    def __init__(self, call: "aio.StreamStreamCall[bytes, bytes]") -> None:
        self._call = call

    async def send(self, request: bytes) -> None:
        try:
            await self._call.write(request)
        except (aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise await self._lost(error) from error

    async def receive(self) -> bytes:
        try:
            message = await self._call.read()
        except aio.AioRpcError as error:
            raise await self._lost(error) from error
        if not isinstance(message, bytes):  # grpc's end-of-stream marker
            raise ShardsLost(f"a shard closed its stream: {await self._call.details() or 'no reason given'}")
        return message

    async def _lost(self, error: Exception) -> ShardsLost:
        reason = f"a shard closed its stream: {await self._call.details() or error}"
        if isinstance(error, aio.AioRpcError):
            reason = describe(error)
        code = await self._call.code()
        return ShardsLost(reason, is_out_of_memory=code is grpc.StatusCode.RESOURCE_EXHAUSTED)

    def cancel(self) -> None:
        self._call.cancel()


def describe(error: aio.AioRpcError) -> str:
    code: grpc.StatusCode = error.code()
    return f"{error.details()} ({code.name})"


def encode_plan(plan: StepPlan) -> bytes:
    """A RunRequest."""
    request = pb.RunRequest()
    message = request.plan
    message.step_id = plan.step_id
    message.drop_sequence_ids.extend(plan.drop)
    message.run_sequence_ids.extend([row.sequence.sequence_id for row in plan.rows])
    message.run_num_tokens.extend([row.num_tokens for row in plan.rows])
    message.run_num_new_blocks.extend([len(row.new_block_ids) for row in plan.rows])
    message.await_masks = plan.awaits_masks
    for row in plan.rows:
        if row.new_block_ids:
            message.new_block_ids.extend(row.new_block_ids)
    for added in plan.add:
        add_sequence(message, added)
    return request.SerializeToString()


def encode_masks(masks: Masks) -> bytes:
    """A RunRequest."""
    bits = b"".join(masks.bits.values())
    message = pb.Masks(step_id=masks.step_id, sequence_ids=list(masks.bits), bits=bits)
    return pb.RunRequest(masks=message).SerializeToString()


def add_sequence(message: pb.StepPlan, added: AddedSequence) -> None:
    """In place: a copy of a long prompt takes a millisecond."""
    sequence, request = added.sequence, added.sequence.request
    sampling = request.sampling
    num_prompt_tokens = sequence.num_prompt_tokens
    message.add.add(
        sequence_id=sequence.sequence_id,
        prompt_token_ids=sequence.token_ids[:num_prompt_tokens],
        output_token_ids=sequence.token_ids[num_prompt_tokens:],
        num_cached_tokens=added.num_cached_tokens,
        sampling=pb.SamplingParameters(
            do_sample=sampling.do_sample,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            typical_p=sampling.typical_p,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            output_frequency_penalty=sampling.output_frequency_penalty,
            output_presence_penalty=sampling.output_presence_penalty,
            watermark=sampling.watermark,
            seed=sampling.seed,
            choice=request.choice,
            min_p=sampling.min_p,
            logit_bias_token_ids=[token_id for token_id, _ in sampling.logit_bias],
            logit_bias_values=[value for _, value in sampling.logit_bias],
        ),
        top_n_tokens=request.top_n_tokens,
        prompt_logprobs=sequence.wants_prompt_logprobs,
        traceparent=request.traceparent,
    )


def decode_result(data: bytes) -> StepResult:
    message = pb.StepResult.FromString(data)
    return StepResult(
        step_id=message.step_id,
        tokens=dict(zip(message.sequence_ids, decode_tokens(message), strict=True)),
        prompt_logprobs=[
            PromptLogprobs(piece.sequence_id, piece.start_position, list(piece.logprobs))
            for piece in message.prompt_logprobs
        ],
        failed={failed.sequence_id: Failure(failed.message, failed.not_finite) for failed in message.failed},
        forward_s=message.forward_ns / 1e9,
        sample_s=message.sample_ns / 1e9,
        total_s=message.total_ns / 1e9,
    )


def decode_tokens(message: pb.StepResult) -> list[SampledToken]:
    if not message.num_top_tokens:
        return [
            SampledToken(token_id, logprob)
            for token_id, logprob in zip(message.token_ids, message.logprobs, strict=True)
        ]
    top_tokens = zip(message.top_token_ids, message.top_logprobs, strict=True)
    return [
        SampledToken(token_id, logprob, tuple(islice(top_tokens, num_top_tokens)))
        for token_id, logprob, num_top_tokens in zip(
            message.token_ids, message.logprobs, message.num_top_tokens, strict=True
        )
    ]
