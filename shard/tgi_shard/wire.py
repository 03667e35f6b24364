"""Protobuf to our own data and back. Beside service.py, with its servicer, no shard file knows tgi_proto."""

import numpy as np

from tgi_proto import generate_pb2 as pb
from tgi_shard.plan import AddSequence, Masks, StepPlan, StepResult
from tgi_shard.sampling.bias import LogitBias
from tgi_shard.sampling.parameters import SamplingParameters


class MalformedPlan(ValueError):
    """Columns that do not fit one another: nothing of the plan can be trusted."""


def step_plan(message: pb.StepPlan) -> StepPlan:
    """Raises MalformedPlan."""
    plan = StepPlan(
        step_id=message.step_id,
        drop_sequence_ids=list(message.drop_sequence_ids),
        add=[_add_sequence(sequence) for sequence in message.add],
        run_sequence_ids=list(message.run_sequence_ids),
        run_num_tokens=np.array(message.run_num_tokens, np.int64),
        run_num_new_blocks=np.array(message.run_num_new_blocks, np.int64),
        new_block_ids=np.array(message.new_block_ids, np.int64),
        await_masks=message.await_masks,
    )
    num_rows = len(plan.run_sequence_ids)
    if len(plan.run_num_tokens) != num_rows or len(plan.run_num_new_blocks) != num_rows:
        raise MalformedPlan(
            f"plan {plan.step_id}: {num_rows} run_sequence_ids, {len(plan.run_num_tokens)} run_num_tokens, "
            f"{len(plan.run_num_new_blocks)} run_num_new_blocks"
        )
    if plan.run_num_new_blocks.sum() != len(plan.new_block_ids):
        raise MalformedPlan(
            f"plan {plan.step_id}: run_num_new_blocks sum up to {plan.run_num_new_blocks.sum()}, "
            f"but there are {len(plan.new_block_ids)} new_block_ids"
        )
    return plan


def masks(message: pb.Masks, vocab_size: int) -> Masks:
    """Raises MalformedPlan."""
    num_rows, row_bytes = len(message.sequence_ids), -(-vocab_size // 32) * 4
    if len(message.bits) != num_rows * row_bytes:
        raise MalformedPlan(
            f"masks of step {message.step_id}: {len(message.bits)} bytes of bits "
            f"for {num_rows} sequence_ids, {row_bytes} bytes each"
        )
    bits = np.frombuffer(message.bits, np.uint8).reshape(num_rows, row_bytes)
    return Masks(message.step_id, list(message.sequence_ids), bits)


def _add_sequence(message: pb.AddSequence) -> AddSequence:
    return AddSequence(
        sequence_id=message.sequence_id,
        prompt_token_ids=np.array(message.prompt_token_ids, np.int64),
        output_token_ids=np.array(message.output_token_ids, np.int64),
        num_cached_tokens=message.num_cached_tokens,
        sampling=_sampling(message.sampling),
        top_n_tokens=message.top_n_tokens,
        prompt_logprobs=message.prompt_logprobs,
        logit_bias=_logit_bias(message.sampling),
    )


def _logit_bias(message: pb.SamplingParameters) -> LogitBias | None:
    num_token_ids, num_values = len(message.logit_bias_token_ids), len(message.logit_bias_values)
    if num_token_ids != num_values:
        raise MalformedPlan(f"{num_token_ids} logit_bias_token_ids, {num_values} logit_bias_values")
    if not num_token_ids:
        return None
    return LogitBias(
        np.array(message.logit_bias_token_ids, np.int64), np.array(message.logit_bias_values, np.float32)
    )


def _sampling(message: pb.SamplingParameters) -> SamplingParameters:
    return SamplingParameters(
        do_sample=message.do_sample,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        typical_p=message.typical_p,
        repetition_penalty=message.repetition_penalty,
        frequency_penalty=message.frequency_penalty,
        output_frequency_penalty=message.output_frequency_penalty,
        output_presence_penalty=message.output_presence_penalty,
        watermark=message.watermark,
        seed=message.seed,
        choice=message.choice,
        min_p=message.min_p,
    )


def step_result(result: StepResult) -> pb.StepResult:
    top_tokens = result.top_tokens
    return pb.StepResult(
        step_id=result.step_id,
        sequence_ids=result.sequence_ids,
        token_ids=result.token_ids,
        logprobs=result.logprobs,
        num_top_tokens=[len(row) for row in top_tokens],
        top_token_ids=[token_id for row in top_tokens for token_id, _ in row],
        top_logprobs=[logprob for row in top_tokens for _, logprob in row],
        prompt_logprobs=[
            pb.PromptLogprobs(
                sequence_id=piece.sequence_id, start_position=piece.start_position, logprobs=piece.logprobs
            )
            for piece in result.prompt_logprobs
        ],
        failed=[
            pb.FailedSequence(
                sequence_id=failure.sequence_id, message=failure.message, not_finite=failure.not_finite
            )
            for failure in result.failed
        ],
        forward_ns=result.forward_ns,
        sample_ns=result.sample_ns,
        total_ns=result.total_ns,
    )
