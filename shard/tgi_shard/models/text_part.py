"""Models of texts and images of which the text model is served: what in their folder belongs to it.

Their config holds a text model's as `text_config`, and their tensors are a text model's behind a prefix.
"""

from tgi_shard.models.spec import HFConfig

MODEL_TYPES = ("gemma3", "llama4", "mistral3")

# What their tensors' names begin with, in either of the orders that transformers has written -> the text
# model's. All others belong to images.
_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}


def config(whole: HFConfig) -> HFConfig:
    """The text model's config, with what the whole decides for it."""
    text = whole.get_text_config()
    text.tie_word_embeddings = whole.tie_word_embeddings
    text.dtype = text.dtype or whole.dtype
    if (quantization := getattr(whole, "quantization_config", None)) is not None:
        text.quantization_config = quantization
    return text


def name(stored: str) -> str | None:
    """The text model's name of a tensor. None: it is not the text model's."""
    for theirs, ours in _PREFIXES.items():
        if stored.startswith(theirs):
            return ours + stored.removeprefix(theirs)
    return None
