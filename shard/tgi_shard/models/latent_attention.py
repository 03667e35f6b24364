"""Multi-head latent attention over a cache of latents. DeepSeek-AI 2024, arXiv:2405.04434.

Keys and values of all heads are linear in one narrow vector of each token, its latent, beside a few key
features that turn and that heads share. So nothing is expanded: a head's query is brought to the latent's
features (`key_up`), all heads attend to the latents as to one KV head whose keys are also its values, and
what they gathered of the latents becomes the head's output (`value_up`). Every rank keeps all latents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_shard.layers.linear import Linear
from tgi_shard.layers.norm import RMSNorm
from tgi_shard.models.decoder import Step


@dataclass(frozen=True, slots=True)
class LatentAttentionLayer:
    index: int
    scale: float
    rotation: int  # in Step.rotations
    query_rank: int  # of a query's narrow vector; 0: there is none
    down: Linear  # to the queries' narrow vector, the latent, and the shared key features that turn
    query_norm: RMSNorm | None
    query_up: Linear  # from the narrow vector, or the hidden states, to this rank's queries
    latent_norm: RMSNorm
    key_up: Tensor  # [local heads, key features that do not turn, latent]
    value_up: Tensor  # [local heads, latent, value features]
    out: Linear

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        num_tokens, (num_heads, num_plain, num_latent) = len(x), self.key_up.shape
        rotation = step.rotations[self.rotation]
        narrow = self.down(x)
        latents = narrow[:, self.query_rank :]
        latents[:, :num_latent] = self.latent_norm(latents[:, :num_latent])
        rotation.apply_(latents[:, None, num_latent:])

        if self.query_norm is not None:
            x = self.query_norm(narrow[:, : self.query_rank])
        heads = self.query_up(x).view(num_tokens, num_heads, -1)
        query = heads.new_empty(num_tokens, num_heads, latents.shape[-1])
        plain = heads[..., :num_plain].transpose(0, 1)
        query[..., :num_latent] = torch.bmm(plain, self.key_up).transpose(0, 1)
        query[..., num_latent:] = heads[..., num_plain:]
        rotation.apply_(query[..., num_latent:])

        attended = step.plan.attend(
            self.index, query, latents[:, None, None], scale=self.scale, window=None
        ).view(query.shape)
        values = torch.bmm(attended[..., :num_latent].transpose(0, 1), self.value_up)
        return self.out(values.transpose(0, 1).reshape(num_tokens, -1))
