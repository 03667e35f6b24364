"""One stream of tokens: what was asked, what has come, and how far the shards are with it."""

from __future__ import annotations  # array[int] exists at run time only from Python 3.12 on

from array import array
from dataclasses import dataclass, field

from tgi_router.grammar.mask import Matcher
from tgi_router.request import Listener, Request
from tgi_router.scheduling.prefix_cache import ROOT_KEY


@dataclass(eq=False, slots=True)
class Sequence:
    """Running state; owned by the scheduler while the sequence lives.

    "Confirmed" is what results have told; "planned" is what will be true once every plan in flight has run.
    The two differ by the lookahead.
    """

    sequence_id: int
    request: Request
    listener: Listener
    token_ids: array[int]  # prompt and confirmed output
    num_prompt_tokens: int  # a decoder's start tokens among them
    max_tokens: int  # prompt and output, if nothing ends it before its limit
    num_first_tokens: int = 1  # that its first step must hold: with an encoder, the whole prompt
    matcher: Matcher | None = None  # where its grammar stands after the confirmed output
    block_ids: list[int] = field(default_factory=list)
    is_on_shards: bool = False  # plans have added it, and not dropped it
    was_scheduled: bool = False
    is_recomputed: bool = False  # its scores were not finite once: it shares no blocks, and fails next time
    num_planned_tokens: int = 0  # known tokens, once the plans in flight have run
    num_planned_computed: int = 0  # of those, with KV
    num_computed: int = 0  # confirmed
    num_plans_in_flight: int = 0  # that run this sequence
    num_prompt_logprobs: int = 0  # prompt positions whose logprobs the listener has
    num_published_blocks: int = 0  # leading blocks that the prefix cache knows by content
    last_published_key: bytes = ROOT_KEY

    @classmethod
    def of(
        cls,
        sequence_id: int,
        request: Request,
        listener: Listener,
        decoder_start_token_ids: tuple[int, ...] = (),
    ) -> Sequence:
        """decoder_start_token_ids: of a model with an encoder, see ModelFacts."""
        token_ids = array("I", request.prompt_token_ids + decoder_start_token_ids)
        return cls(
            sequence_id,
            request,
            listener,
            token_ids,
            num_prompt_tokens=len(token_ids),
            max_tokens=len(token_ids) + request.max_new_tokens,
            num_first_tokens=len(token_ids) if decoder_start_token_ids else 1,
            matcher=None if request.grammar is None else request.grammar.matcher(),
            num_planned_tokens=len(token_ids),
        )

    @property
    def num_pending(self) -> int:
        """Known tokens that no plan computes yet: 1 for a decode, more for a prompt.

        0 only once all output is planned.
        """
        if self.num_planned_tokens >= self.max_tokens:
            return 0
        return self.num_planned_tokens - self.num_planned_computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.prompt_logprobs and self.num_prompt_logprobs < self.num_prompt_tokens

    @property
    def may_share_blocks(self) -> bool:
        """Whether it may begin with what the prefix cache has. A cached token has no logits."""
        return not self.wants_prompt_logprobs and not self.is_recomputed

    def forget_shards(self) -> None:
        """Nothing of the sequence is on the shards any more; its tokens remain."""
        self.block_ids = []
        self.is_on_shards = False
        self.num_planned_tokens = len(self.token_ids)
        self.num_planned_computed = self.num_computed = 0
        self.num_published_blocks = 0
        self.last_published_key = ROOT_KEY
