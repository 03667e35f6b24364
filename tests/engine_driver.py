"""A router in small: gives out blocks, writes plans, collects what the engine answers."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import tiny_models
from tgi_shard.distributed import SINGLE, Group
from tgi_shard.engine import Engine, PendingResult
from tgi_shard.models.registry import load_model
from tgi_shard.plan import AddSequence, StepPlan, StepResult
from tgi_shard.sampling.parameters import SamplingParameters
from tgi_shard.sampling.sampler import Sampler
from tgi_shard.slots import Slots

BLOCK_SIZE = 8
MAX_SEQUENCES = 40


def load_engine(
    path: Path,
    *,
    num_blocks: int = 256,
    max_total_tokens: int = 200,
    group: Group = SINGLE,
    dtype: torch.dtype = torch.float32,
    deterministic: bool = False,
) -> Engine:
    device = torch.device("cpu")
    loaded = load_model(path, dtype=dtype, device=device, group=group, deterministic=deterministic)
    kv_shape = loaded.model.kv_shape
    block_size = BLOCK_SIZE if kv_shape.can_share_prefixes else max_total_tokens
    return Engine(
        loaded.model,
        kv_shape.allocate(num_blocks, block_size, device),
        Slots(
            max_sequences=MAX_SEQUENCES,
            max_total_tokens=max_total_tokens,
            num_blocks=num_blocks,
            block_size=block_size,
            vocab_size=loaded.vocab_size,
            device=device,
            num_start_tokens=len(loaded.decoder_start_token_ids),
        ),
        Sampler(),
        group,
    )


def make_plan(
    step_id: int,
    *,
    drop: list[int] | None = None,
    add: list[AddSequence] | None = None,
    run: dict[int, tuple[int, list[int]]] | None = None,
) -> StepPlan:
    """run: sequence id -> (number of tokens, new block ids)."""
    rows = run or {}
    return StepPlan(
        step_id=step_id,
        drop_sequence_ids=drop or [],
        add=add or [],
        run_sequence_ids=list(rows),
        run_num_tokens=np.array([num_tokens for num_tokens, _ in rows.values()], np.int64),
        run_num_new_blocks=np.array([len(blocks) for _, blocks in rows.values()], np.int64),
        new_block_ids=np.array([block for _, blocks in rows.values() for block in blocks], np.int64),
    )


@dataclass
class Stream:
    """One sequence as the router knows it."""

    prompt: list[int]
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    top_n: int = 0
    prompt_logprobs: bool = False
    output: list[int] = field(default_factory=list)  # confirmed
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    of_prompt: dict[int, float] = field(default_factory=dict)
    error: str | None = None
    # What the plans so far come to, confirmed or not.
    num_known: int = 0
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)


class Driver:
    """Keeps `depth` plans in flight: with 2, a plan is written before the last result has been read."""

    def __init__(self, engine: Engine, *, chunk: int = 1000, depth: int = 1, seed: int = 0) -> None:
        self.engine = engine
        self.chunk = chunk
        self.depth = depth
        self.streams: dict[int, Stream] = {}
        self.results: list[StepResult] = []
        self._pending: list[PendingResult] = []
        self._step_id = 0
        self._add: list[AddSequence] = []
        self._drop: list[int] = []
        self._to_grant: dict[int, list[int]] = {}  # shared blocks of sequences that have not run yet
        self._free = list(range(engine.kv_cache.num_blocks))
        np.random.default_rng(seed).shuffle(self._free)

    def add(self, sequence_id: int, stream: Stream, *, shared_blocks: list[int] | None = None) -> None:
        """Start `stream`, or start it again from its tokens.

        shared_blocks: full ones that hold its first tokens.
        """
        stream.blocks = list(shared_blocks or [])
        stream.num_known = len(stream.prompt) + len(stream.output)
        stream.num_computed = len(stream.blocks) * self.engine.slots.block_size
        self.streams[sequence_id] = stream
        self._add.append(
            AddSequence(
                sequence_id=sequence_id,
                prompt_token_ids=np.array(stream.prompt),
                output_token_ids=np.array(stream.output, np.int64),
                num_cached_tokens=stream.num_computed,
                sampling=stream.sampling,
                top_n_tokens=stream.top_n,
                prompt_logprobs=stream.prompt_logprobs,
            )
        )
        self._to_grant[sequence_id] = list(stream.blocks)

    def drop(self, sequence_id: int) -> Stream:
        stream = self.streams.pop(sequence_id)
        self._drop.append(sequence_id)
        self._free.extend(stream.blocks)
        return stream

    def step(self) -> None:
        """Run every stream by one chunk or one token."""
        self._step_id += 1
        run = {}
        for sequence_id, stream in self.streams.items():
            num_tokens = min(self.chunk, stream.num_known - stream.num_computed)
            stream.num_computed += num_tokens
            num_blocks = -(-stream.num_computed // self.engine.slots.block_size)
            granted = self._to_grant.pop(sequence_id, [])
            while len(stream.blocks) < num_blocks:
                stream.blocks.append(self._free.pop(0))
                granted.append(stream.blocks[-1])
            run[sequence_id] = (num_tokens, granted)
            stream.num_known += stream.num_computed == stream.num_known
        plan = make_plan(self._step_id, drop=self._drop, add=self._add, run=run)
        self._drop, self._add = [], []
        self._pending.append(self.engine.step(plan))
        while len(self._pending) >= self.depth:
            self._read()

    def _read(self) -> None:
        result = self.engine.finish(self._pending.pop(0))
        self.results.append(result)
        tops = result.top_tokens or [[]] * len(result.sequence_ids)
        for sequence_id, token_id, logprob, top in zip(
            result.sequence_ids, result.token_ids, result.logprobs, tops, strict=True
        ):
            if sequence_id in self.streams:
                stream = self.streams[sequence_id]
                stream.output.append(token_id)
                stream.logprobs.append(logprob)
                stream.top.append(top)
        for piece in result.prompt_logprobs:
            for i, value in enumerate(piece.logprobs):
                self.streams[piece.sequence_id].of_prompt[piece.start_position + i] = value
        for failure in result.failed:
            stream = self.streams.pop(failure.sequence_id)
            stream.error = failure.message
            self._free.extend(stream.blocks)

    def drain(self) -> None:
        while self._pending:
            self._read()

    def run(self, num_output: int) -> None:
        """Step until every stream has so many output tokens; some will have a few more."""
        while any(len(stream.output) < num_output for stream in self.streams.values()):
            self.step()
        self.drain()


def generate(
    engine: Engine, streams: list[Stream], num_output: int, *, chunk: int = 1000, depth: int = 1
) -> list[Stream]:
    """Run `streams` together on an engine that has forgotten the past; each ends with `num_output` tokens."""
    engine.forget()
    driver = Driver(engine, chunk=chunk, depth=depth)
    for i, stream in enumerate(streams):
        driver.add(i + 1, stream)
    driver.run(num_output)
    for stream in streams:
        del stream.output[num_output:], stream.logprobs[num_output:], stream.top[num_output:]
    return streams


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    return tiny_models.prompts(lengths, seed=seed)
