"""What the router tells the shards in one step, and what comes back. The wire form is generate.proto's."""

from dataclasses import dataclass, field

from msgspec import Struct

from tgi_router.request import SampledToken
from tgi_router.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class AddedSequence:
    """A sequence that the shards build from nothing."""

    sequence: Sequence
    num_cached_tokens: int


# The garbage collector must see it (no `gc=False`): its sequence leads to an answer, an error, the frames of
# that error's traceback, and back here.
class Row(Struct, frozen=True):
    sequence: Sequence
    num_tokens: int  # to process in this step
    new_block_ids: tuple[int, ...]
    samples: bool  # computed tokens reach the known ones: a token will come back


@dataclass(slots=True)
class StepPlan:
    step_id: int
    drop: list[int] = field(default_factory=list)  # sequence ids
    add: list[AddedSequence] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    @property
    def awaits_masks(self) -> bool:
        """Whether a row samples whose next token a grammar restricts."""
        return any(row.samples and row.sequence.matcher is not None for row in self.rows)


@dataclass(frozen=True, slots=True)
class Masks:
    """What a plan that awaits masks is told, once its sequences' last tokens are known."""

    step_id: int
    bits: dict[int, bytes]  # by sequence id; those that ended meanwhile are left out


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    sequence_id: int
    start_position: int
    logprobs: list[float]


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong with a sequence."""

    message: str
    not_finite: bool  # its scores were: the shards can do no better with what they hold of it


@dataclass(frozen=True, slots=True)
class StepResult:
    step_id: int
    tokens: dict[int, SampledToken]  # by sequence id
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    failed: dict[int, Failure] = field(default_factory=dict)  # by sequence id
    forward_s: float = 0.0
    sample_s: float = 0.0
    total_s: float = 0.0
