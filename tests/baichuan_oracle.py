"""Baichuan's oracle, since transformers ships none: its Llama with the weights of a Baichuan checkpoint.

W_pack is Llama's three projections one above the other. The 13B's layer is Llama's without rotation (every
frequency is 0) under a mask that holds ALiBi's distances, from transformers' BLOOM. Baichuan 2's head is a
plain one whose rows were divided by their length.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from tgi_shard.models.architectures.baichuan import BaichuanConfig

_QKV = ("q_proj", "k_proj", "v_proj")


class Baichuan13B(LlamaForCausalLM):
    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        num_tokens = input_ids.shape[1]
        self.model.rotary_emb.inv_freq.zero_()
        everyone = torch.ones(1, num_tokens)
        rises = build_alibi_tensor(everyone, self.config.num_attention_heads, self.dtype)  # with the key
        is_later = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
        mask = rises.unsqueeze(0).masked_fill(is_later, torch.finfo(self.dtype).min)
        return CausalLMOutput(logits=super().forward(input_ids, attention_mask=mask).logits)


def new(config: PreTrainedConfig) -> LlamaForCausalLM:
    """With random weights; a head as it is before Baichuan 2 normalises it."""
    assert isinstance(config, BaichuanConfig)
    fields = {
        name: getattr(config, name)
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("hidden_act", "rms_norm_eps", "initializer_range", "rope_parameters"),
            *("bos_token_id", "eos_token_id", "pad_token_id"),
        )
    }
    is_7b = config.max_position_embeddings is not None
    return (LlamaForCausalLM if is_7b else Baichuan13B)(LlamaConfig(**fields))


def save(model: LlamaForCausalLM, config: PreTrainedConfig, path: Path) -> None:
    """config and weights under Baichuan's names."""
    tensors = dict(model.state_dict())
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        rows = [tensors.pop(f"{prefix}{module}.weight") for module in _QKV]
        tensors[f"{prefix}W_pack.weight"] = torch.cat(rows)
    config.save_pretrained(path)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def load(path: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    config = AutoConfig.from_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        rows = tensors.pop(f"{prefix}W_pack.weight").chunk(3)
        tensors |= {f"{prefix}{module}.weight": part for module, part in zip(_QKV, rows, strict=True)}
    if config.z_loss_weight is not None or config.vocab_size == 125696:
        head = tensors["lm_head.weight"].float()
        tensors["lm_head.weight"] = head / head.square().sum(-1, keepdim=True).sqrt()
    model = new(config).to(dtype)
    model.load_state_dict(tensors)
    return model.eval()
