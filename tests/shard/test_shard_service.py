"""Shards as real processes: the calls of generate.proto, streams that break, groups, how a process ends."""

import queue
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

import tiny_models
from engine_driver import Stream, generate, load_engine, prompts
from shard_process import ShardProcess, running
from tgi_proto import generate_pb2 as pb
from tgi_proto import generate_pb2_grpc as pb_grpc

LIMITS = pb.WarmupRequest(max_step_tokens=512, max_total_tokens=300, max_sequences=16)
NUM_OUTPUT = 10
LENGTHS = (3, 33, 70)
SEEDED = pb.SamplingParameters(
    do_sample=True, temperature=1, top_p=0.9, typical_p=1, repetition_penalty=1.1, seed=2**63 + 5, choice=1
)
GREEDY = pb.SamplingParameters(temperature=1, top_p=1, typical_p=1, repetition_penalty=1)


class RunStream:
    """Run streams to all ranks: every plan goes to each, results come from rank 0."""

    def __init__(self, shards: list[ShardProcess]) -> None:
        self._channels = [shard.channel() for shard in shards]
        self._plans: list[queue.SimpleQueue[pb.RunRequest | None]] = [queue.SimpleQueue() for _ in shards]
        self.calls = [
            pb_grpc.TextGenerationStub(channel).Run(iter(plans.get, None))
            for channel, plans in zip(self._channels, self._plans, strict=True)
        ]

    def send(self, plan: pb.StepPlan) -> None:
        for plans in self._plans:
            plans.put(pb.RunRequest(plan=plan))

    def send_masks(self, masks: pb.Masks) -> None:
        for plans in self._plans:
            plans.put(pb.RunRequest(masks=masks))

    def receive(self) -> pb.StepResult:
        result, *others = [next(call) for call in self.calls]
        assert all(other == pb.StepResult(step_id=result.step_id) or other.forward_ns for other in others)
        assert not any(other.sequence_ids for other in others)
        return result

    def close(self) -> None:
        for plans in self._plans:
            plans.put(None)
        for call in self.calls:
            assert list(call) == []

    def break_off(self) -> None:
        for call in self.calls:
            call.cancel()
        for plans, channel in zip(self._plans, self._channels, strict=True):
            plans.put(None)
            channel.close()


def warm_up(shards: list[ShardProcess], request: pb.WarmupRequest = LIMITS) -> list[pb.WarmupResponse]:
    channels = [shard.channel() for shard in shards]
    futures = [pb_grpc.TextGenerationStub(channel).Warmup.future(request, timeout=60) for channel in channels]
    try:
        return [future.result() for future in futures]
    finally:
        for channel in channels:
            channel.close()


def wait_until_in_a_step(shard: ShardProcess) -> None:
    deadline = time.monotonic() + 20
    with shard.channel() as channel:
        stub = pb_grpc.TextGenerationStub(channel)
        while not stub.Health(pb.HealthRequest(), timeout=5).current_step_age_s:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def add(sequence_id: int, prompt: list[int], sampling: pb.SamplingParameters = GREEDY) -> pb.AddSequence:
    return pb.AddSequence(
        sequence_id=sequence_id,
        prompt_token_ids=prompt,
        sampling=sampling,
        top_n_tokens=2,
        prompt_logprobs=len(prompt) < LENGTHS[-1],
    )


def first_plan(sequence_id: int, prompt: list[int], block_id: int) -> pb.StepPlan:
    """A whole prompt that fits into one block."""
    return pb.StepPlan(
        step_id=1,
        add=[add(sequence_id, prompt)],
        run_sequence_ids=[sequence_id],
        run_num_tokens=[len(prompt)],
        run_num_new_blocks=[1],
        new_block_ids=[block_id],
    )


def run_all(
    shards: list[ShardProcess], block_size: int, sampling: pb.SamplingParameters = GREEDY
) -> list[list[int]]:
    """Generate from LENGTHS' prompts, two plans ahead of the results."""
    ids = [11, 12, 13]
    num_blocks = 300 // block_size + 1  # each sequence has all of its blocks from the start
    plans = [
        pb.StepPlan(  # a chunk alone: nobody samples
            add=[add(i, prompt, sampling) for i, prompt in zip(ids, prompts(*LENGTHS), strict=True)],
            run_sequence_ids=ids[2:],
            run_num_tokens=[20],
            run_num_new_blocks=[num_blocks],
            new_block_ids=range(num_blocks),
        ),
        pb.StepPlan(
            run_sequence_ids=ids,
            run_num_tokens=[*LENGTHS[:2], LENGTHS[2] - 20],
            run_num_new_blocks=[num_blocks, num_blocks, 0],
            new_block_ids=range(num_blocks, 3 * num_blocks),
        ),
    ]
    decode = pb.StepPlan(run_sequence_ids=ids, run_num_tokens=[1] * 3, run_num_new_blocks=[0] * 3)
    plans += [decode] * (NUM_OUTPUT - 1)

    stream = RunStream(shards)
    results: list[pb.StepResult] = []
    for step_id, plan in enumerate(plans, 1):
        stream.send(pb.StepPlan(step_id=step_id, **{field.name: value for field, value in plan.ListFields()}))
        while len(results) < step_id - (2 if step_id < len(plans) else 0):
            results.append(stream.receive())
    stream.close()

    assert [result.step_id for result in results] == list(range(1, len(plans) + 1))
    assert not results[0].sequence_ids
    pieces = results[1].prompt_logprobs
    assert {piece.sequence_id: len(piece.logprobs) for piece in pieces} == {11: 2, 12: 32}
    for result in results[1:]:
        assert list(result.sequence_ids) == ids
        assert list(result.num_top_tokens) == [2] * 3
        assert len(result.top_token_ids) == len(result.top_logprobs) == 6
        assert result.total_ns >= result.forward_ns > 0
    return [[result.token_ids[row] for result in results[1:]] for row in range(3)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    streams = [Stream(prompt) for prompt in prompts(*LENGTHS)]
    generate(load_engine(checkpoint), streams, NUM_OUTPUT)
    return [stream.output for stream in streams]


@pytest.fixture(scope="module")
def shard(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardProcess]:
    with running(checkpoint, tmp_path_factory.mktemp("run")) as (only,):
        yield only
    assert "Traceback" not in only.log_path.read_text()


@pytest.fixture
def stub(shard: ShardProcess) -> Iterator[pb_grpc.TextGenerationStub]:
    with shard.channel() as channel:
        yield pb_grpc.TextGenerationStub(channel)


def test_info_health_and_run_before_warmup(stub: pb_grpc.TextGenerationStub) -> None:
    info = stub.Info(pb.InfoRequest())
    assert (info.model_type, info.dtype, info.device_type) == ("llama", "float32", "cpu")
    assert (info.vocab_size, info.max_position_embeddings) == (259, 512)
    assert list(info.eos_token_ids) == [tiny_models.EOS_ID]
    assert (info.world_size, info.rank) == (1, 0)
    health = stub.Health(pb.HealthRequest())
    assert health.current_step_age_s == 0
    if health.last_step_id == 0:
        with pytest.raises(grpc.RpcError, match="Run needs a Warmup before it"):
            next(stub.Run(iter([])))


def test_warmup_answers_the_same_twice(shard: ShardProcess) -> None:
    (first,), (second,) = warm_up([shard]), warm_up([shard])
    assert first == second
    assert first.max_total_tokens == 300
    assert first.num_blocks >= 16 * 300 // first.block_size
    other = pb.WarmupRequest(max_step_tokens=512, max_total_tokens=301, max_sequences=16)
    with pytest.raises(grpc.RpcError, match="was warmed up for"):
        warm_up([shard], other)


def test_a_stream_generates_and_the_next_one_starts_from_nothing(
    shard: ShardProcess, stub: pb_grpc.TextGenerationStub, expected: list[list[int]]
) -> None:
    (warm,) = warm_up([shard])
    assert run_all([shard], warm.block_size) == expected
    health = stub.Health(pb.HealthRequest())
    assert health.last_step_id == NUM_OUTPUT + 1
    assert 0 < health.last_step_age_s < 60
    sampled = run_all(
        [shard], warm.block_size, SEEDED
    )  # the same sequence ids: the stream before is forgotten
    assert sampled == run_all([shard], warm.block_size, SEEDED) != expected


def test_a_broken_stream_is_forgotten(shard: ShardProcess, expected: list[list[int]]) -> None:
    (warm,) = warm_up([shard])
    for _ in range(3):
        stream = RunStream([shard])
        plan = pb.StepPlan(
            step_id=1,
            add=[add(i, [1, 2, 3]) for i in range(11, 27)],  # every slot
            run_sequence_ids=range(11, 27),
            run_num_tokens=[3] * 16,
            run_num_new_blocks=[1] * 16,
            new_block_ids=range(16),
        )
        stream.send(plan)
        result = stream.receive()
        assert not result.failed
        assert len(result.token_ids) == 16
        stream.send(pb.StepPlan(step_id=2, run_sequence_ids=[11], run_num_tokens=[1], run_num_new_blocks=[0]))
        stream.break_off()
        assert run_all([shard], warm.block_size) == expected


def test_a_second_stream_takes_over(shard: ShardProcess, expected: list[list[int]]) -> None:
    (warm,) = warm_up([shard])
    old = RunStream([shard])
    plan = first_plan(11, [1, 2], block_id=5)
    old.send(plan)
    old.receive()
    assert run_all([shard], warm.block_size) == expected
    with pytest.raises(grpc.RpcError, match="another Run stream has been opened"):
        old.receive()
    old.break_off()


def test_a_bad_sequence_fails_alone_and_a_malformed_plan_ends_the_stream(shard: ShardProcess) -> None:
    warm_up([shard])
    stream = RunStream([shard])
    stream.send(
        pb.StepPlan(
            step_id=1,
            add=[add(1, [1, 999]), add(2, [5, 6])],
            run_sequence_ids=[1, 2, 3],
            run_num_tokens=[2, 2, 1],
            run_num_new_blocks=[1, 1, 0],
            new_block_ids=[0, 1],
        )
    )
    result = stream.receive()
    assert {failure.sequence_id: failure.message for failure in result.failed} == {
        1: "token id 999 is not below the vocabulary's size, 259",
        3: "there is no sequence 3",
    }
    assert list(result.sequence_ids) == [2]
    stream.send(pb.StepPlan(step_id=2, run_sequence_ids=[2], run_num_tokens=[1, 1], run_num_new_blocks=[0]))
    with pytest.raises(grpc.RpcError, match="1 run_sequence_ids, 2 run_num_tokens"):
        stream.receive()
    stream.break_off()


def test_two_ranks_generate_what_one_does(
    checkpoint: Path, tmp_path: Path, expected: list[list[int]], shard: ShardProcess
) -> None:
    (warm,) = warm_up([shard])
    sampled = run_all([shard], warm.block_size, SEEDED)
    with running(checkpoint, tmp_path, world_size=2) as shards:
        first, second = warm_up(shards)
        assert first == second
        assert run_all(shards, first.block_size) == expected
        assert run_all(shards, first.block_size, SEEDED) == sampled
    assert [shard.process.returncode for shard in shards] == [0, 0]


def test_sigterm_ends_the_process_and_leaves_no_socket(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "s-0").write_text("stale")
    with running(checkpoint, tmp_path) as (shard,):
        warm_up([shard])
        stream = RunStream([shard])
        stream.send(pb.StepPlan(step_id=1))
        assert stream.receive().step_id == 1
        began_at = time.monotonic()
        shard.process.send_signal(signal.SIGTERM)
        assert shard.process.wait(10) == 0
        assert time.monotonic() - began_at < 5
        stream.break_off()
    assert not shard.socket_path.exists()
    log = shard.log_path.read_text()
    assert f"Server started at unix://{shard.socket_path}" in log
    assert "GB/s" in log
    assert "Traceback" not in log


def test_a_rank_without_its_peer_ends_with_an_error(checkpoint: Path, tmp_path: Path) -> None:
    """No sequence is guilty of it: the stream ends with INTERNAL, the process with an exit code."""
    with running(checkpoint, tmp_path, world_size=2) as shards:
        warm_up(shards)
        stream = RunStream(shards)
        shards[1].process.kill()
        shards[1].process.wait()
        plan = first_plan(1, [5, 6], block_id=0)
        stream.send(plan)
        with pytest.raises(grpc.RpcError) as failure:
            next(stream.calls[0])
        assert failure.value.code() is grpc.StatusCode.INTERNAL
        assert shards[0].process.wait(20) not in (0, None)
        stream.break_off()
    assert "A step failed; this process ends" in shards[0].log_path.read_text()


def test_a_rank_that_waits_for_a_plan_that_its_peer_never_got_ends(checkpoint: Path, tmp_path: Path) -> None:
    """So it is when the router dies, or loses one connection, after it has sent a plan to one of two."""
    with running(checkpoint, tmp_path, world_size=2) as shards:
        warm_up(shards)
        stream = RunStream(shards[:1])
        plan = first_plan(1, [5, 6], block_id=0)
        stream.send(plan)
        wait_until_in_a_step(shards[0])
        stream.break_off()
        assert shards[0].process.wait(40) not in (0, None)
    assert "a step of a stream that broke has not ended" in shards[0].log_path.read_text()


def test_a_warmup_that_its_caller_gave_up_is_found_again(checkpoint: Path, tmp_path: Path) -> None:
    """A router that lost one rank calls again; the other rank must not start a second, lonely warm-up."""
    request = pb.WarmupRequest(max_step_tokens=64, max_total_tokens=64, max_sequences=4)
    with (
        running(checkpoint, tmp_path, world_size=2) as ranks,
        ranks[0].channel() as zero,
        ranks[1].channel() as one,
    ):
        stubs = [pb_grpc.TextGenerationStub(channel) for channel in (zero, one)]
        with pytest.raises(grpc.RpcError) as error:
            stubs[1].Warmup(request, timeout=0.5)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        answers = [stub.Warmup.future(request, timeout=30) for stub in stubs]
        assert answers[0].result() == answers[1].result()
