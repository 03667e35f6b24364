"""Multi-head latent attention over a cache of latents. DeepSeek-AI 2024, arXiv:2405.04434.

Keys and values of all heads are linear in one narrow vector of each token, its latent, beside a few key
features that turn and that heads share. So nothing is expanded: a head's query is brought to the latent's
features (`key_up`), all heads attend to the latents as to one KV head whose keys are also its values, and
what they gathered of the latents becomes the head's output (`value_up`). Every rank keeps all latents.
"""

from dataclasses import dataclass

from torch import Tensor

from tgi_shard.layers.linear import Linear
from tgi_shard.layers.norm import RMSNorm
from tgi_shard.layers.per_head import AnyPerHead
from tgi_shard.models.decoder import Step


@dataclass(frozen=True, slots=True)
class LatentAttentionLayer:
    index: int
    scale: float
    rotation: int  # in Step.rotations
    num_heads: int  # this rank's
    num_plain: int  # features of a query that do not turn
    query_rank: int  # of a query's narrow vector; 0: there is none
    down: Linear  # to the queries' narrow vector, the latent, and the shared key features that turn
    query_norm: RMSNorm | None
    query_up: Linear  # from the narrow vector, or the hidden states, to this rank's queries
    latent_norm: RMSNorm
    key_up: AnyPerHead  # of the local heads: from key features that do not turn to the latent's
    value_up: AnyPerHead  # from the latent's features to the value's
    out: Linear

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        num_tokens, num_latent = len(x), len(self.latent_norm.weight)
        rotation = step.rotations[self.rotation]
        narrow = self.down(x)
        latents = narrow[:, self.query_rank :]
        latents[:, :num_latent] = self.latent_norm(latents[:, :num_latent])
        rotation.apply_(latents[:, None, num_latent:])

        if self.query_norm is not None:
            x = self.query_norm(narrow[:, : self.query_rank])
        heads = self.query_up(x).view(num_tokens, self.num_heads, -1)
        query = heads.new_empty(num_tokens, self.num_heads, latents.shape[-1])
        query[..., :num_latent] = self.key_up(heads[..., : self.num_plain])
        query[..., num_latent:] = heads[..., self.num_plain :]
        rotation.apply_(query[..., num_latent:])

        attended = step.plan.attend(
            self.index, query, latents[:, None, None], scale=self.scale, window=None
        ).view(query.shape)
        return self.out(self.value_up(attended[..., :num_latent]).reshape(num_tokens, -1))
