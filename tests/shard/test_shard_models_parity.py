"""Every decoder computes what transformers computes, however a step batches, chunks and pages it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

import tiny_models
from model_steps import Row, Stepper
from tgi_shard.distributed import SINGLE
from tgi_shard.models.registry import LoadedModel, load_model
from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.transformers_fallback import TransformersModel

CPU = torch.device("cpu")
BLOCK_SIZE = 16
LENGTHS = (1, 7, 33, 70)  # less than a block, one and a bit, several


@dataclass(frozen=True)
class Pair:
    """A checkpoint in our hands and in transformers'."""

    loaded: LoadedModel
    oracle: torch.nn.Module

    def stepper(self) -> Stepper:
        return Stepper(self.loaded, block_size=BLOCK_SIZE)

    @torch.inference_mode()
    def expected(self, token_ids: Sequence[int]) -> Tensor:
        """transformers' logits for one sequence: [tokens, vocab_size]."""
        logits: Tensor = self.oracle(torch.tensor([list(token_ids)])).logits[0]
        return logits


def pair(checkpoint: Path, **options: Any) -> Pair:
    loaded = load_model(checkpoint, dtype=torch.float32, device=CPU, group=SINGLE, **options)
    return Pair(loaded, tiny_models.oracle(checkpoint))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


ALL = [
    pytest.param(model_type, marks=[] if model_type in tiny_models.REPRESENTATIVES else pytest.mark.matrix)
    for model_type in tiny_models.FAMILIES
]


THROUGH_TRANSFORMERS = [
    pytest.param(
        f"{model_type}, through transformers",
        marks=[] if model_type in ("vaultgemma", "diffllama", "dots1") else pytest.mark.matrix,
    )
    for model_type in (*tiny_models.FALLBACK, *tiny_models.BOTH_WAYS)
]


@pytest.mark.parametrize("model_type", [*tiny_models.FALLBACK, *tiny_models.BOTH_WAYS])
def test_every_family_of_the_fallback(model_type: str, tmp_path: Path) -> None:
    both = pair(tiny_models.save(model_type, tmp_path), through_transformers=True)
    assert isinstance(both.loaded.model, TransformersModel)
    _assert_same_after_prefill_and_decode(both)


@pytest.mark.parametrize("model_type", tiny_models.FAMILIES)
def test_every_family(model_type: str, tmp_path: Path) -> None:
    _assert_same_after_prefill_and_decode(pair(tiny_models.save(model_type, tmp_path)))


@pytest.fixture(scope="module", params=[*ALL, *THROUGH_TRANSFORMERS])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    model_type, _, path = request.param.partition(", ")
    checkpoint = tiny_models.save(model_type, tmp_path_factory.mktemp(model_type))
    return pair(checkpoint, through_transformers=path == "through transformers")


def test_prompt_logits_in_one_ragged_batch(family: Pair) -> None:
    prompts = tiny_models.prompts(LENGTHS)
    _, logits = family.stepper().prefill(prompts)
    assert_close(logits, torch.cat([family.expected(prompt) for prompt in prompts]))


def test_greedy_tokens_and_their_logits(family: Pair) -> None:
    prompts, num_steps = tiny_models.prompts(LENGTHS), 24
    stepper = family.stepper()
    rows, logits = stepper.prefill(prompts)
    ours = [logits[torch.tensor(LENGTHS).cumsum(0) - 1]]
    for _ in range(num_steps):
        ours.append(stepper.decode(rows, ours[-1]))
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        expected = family.expected(row.token_ids)[len(prompt) - 1 :]
        assert row.token_ids[len(prompt) :] == expected[:-1].argmax(-1).tolist()
        assert_close(torch.stack([step[index] for step in ours]), expected)
    generated = {
        token for prompt, row in zip(prompts, rows, strict=True) for token in row.token_ids[len(prompt) :]
    }
    assert len(generated) > num_steps // 3, "a model that repeats itself proves nothing"


@pytest.mark.parametrize("chunk", [1, 5, 16, 17, 69])
def test_a_chunked_prompt_equals_a_whole_one(family: Pair, chunk: int) -> None:
    (prompt,) = tiny_models.prompts((70,))
    stepper, row = family.stepper(), Row(list(prompt))
    parts = []
    while row.num_computed < len(prompt):
        num_tokens = min(chunk, len(prompt) - row.num_computed)
        parts.append(stepper.step([(row, num_tokens)], all_logits=True))
    assert_close(torch.cat(parts), family.expected(prompt))


def test_decodes_and_chunks_share_a_step(family: Pair) -> None:
    long, short, late = (Row(list(prompt)) for prompt in tiny_models.prompts((70, 7, 33)))
    stepper = family.stepper()
    first = stepper.step([(long, 20), (short, 7)])
    short.token_ids.append(int(first[1].argmax()))
    second = stepper.step([(long, 30), (late, 16), (short, 1)])
    short.token_ids.append(int(second[2].argmax()))
    third = stepper.step([(short, 1), (late, 17), (long, 20)])
    assert_close(third[0], family.expected(short.token_ids)[-1])
    assert_close(third[1], family.expected(late.token_ids)[-1])
    assert_close(third[2], family.expected(long.token_ids)[-1])


def test_preempted_and_resumed_on_the_blocks_of_another(family: Pair) -> None:
    """A sequence computed anew from its tokens, of which another one's blocks may still hold the first."""
    (prompt,) = tiny_models.prompts((39,))
    stepper = family.stepper()
    (row,), logits = stepper.prefill([prompt])
    logits = logits[-1:]
    for _ in range(3):
        logits = stepper.decode([row], logits)
    num_shared = 2 if family.loaded.model.kv_shape.can_share_prefixes else 0
    num_cached = num_shared * BLOCK_SIZE
    # Where nothing can be shared, the resumed one begins on the block with the preempted one's state.
    resumed = Row(list(row.token_ids), num_cached, row.block_ids[: max(num_shared, 1)])
    rest = stepper.step([(resumed, len(resumed.token_ids) - num_cached)], all_logits=True)
    assert_close(rest, family.expected(row.token_ids)[num_cached:])
    assert_close(rest[-1:], logits)


def test_a_row_does_not_depend_on_its_neighbours(family: Pair) -> None:
    prompts = tiny_models.prompts((40, 3, 90, 17, 64))
    alone_stepper, crowd_stepper = family.stepper(), family.stepper()
    (alone,), logits = alone_stepper.prefill(prompts[:1])
    crowd, crowd_logits = crowd_stepper.prefill(prompts)
    torch.testing.assert_close(crowd_logits[:40], logits, rtol=1e-5, atol=1e-5)
    ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0) - 1
    after_alone = alone_stepper.decode([alone], logits[-1:])
    after_crowd = crowd_stepper.decode(crowd, crowd_logits[ends])
    torch.testing.assert_close(after_crowd[:1], after_alone, rtol=1e-5, atol=1e-5)


def test_a_step_without_logits_only_writes_kv(family: Pair) -> None:
    (prompt,) = tiny_models.prompts((33,))
    stepper, row = family.stepper(), Row(list(prompt))
    inputs = stepper.inputs([(row, 20)])
    with torch.inference_mode():
        inputs = replace(inputs, logit_indices=torch.tensor([], dtype=torch.int64))
        nothing = family.loaded.model.forward(inputs, stepper.kv_cache)
    assert nothing.shape == (0, family.loaded.vocab_size)
    assert_close(stepper.step([(row, 13)])[0], family.expected(prompt)[-1])


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_variants_of_a_family(variant: str, tmp_path: Path) -> None:
    model_type, overrides = tiny_models.VARIANTS[variant]
    _assert_same_after_prefill_and_decode(pair(tiny_models.save(model_type, tmp_path, seed=3, **overrides)))


def _assert_same_after_prefill_and_decode(both: Pair) -> None:
    prompts = tiny_models.prompts((5, 70))
    stepper = both.stepper()
    rows, logits = stepper.prefill(prompts)
    assert_close(logits, torch.cat([both.expected(prompt) for prompt in prompts]))
    logits = stepper.decode(rows, logits[[4, -1]])
    assert_close(logits, torch.stack([both.expected(row.token_ids)[-1] for row in rows]))


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {"rope_parameters": tiny_models.ROPE | {"rope_type": "dynamic", "factor": 3.0}}),
        (
            "phi3",
            {
                "rope_parameters": tiny_models.ROPE | tiny_models.LONGROPE,
                "original_max_position_embeddings": tiny_models.LONGROPE["original_max_position_embeddings"],
            },
        ),
    ],
    ids=["dynamic", "longrope"],
)
def test_rope_past_the_trained_context_is_that_of_decoding(
    model_type: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    """transformers rotates all by the length it sees at once: token by token, each by its own place."""
    tiny_models.save(model_type, tmp_path, **{"max_position_embeddings": 40} | overrides)
    both = pair(tmp_path)
    (prompt,) = tiny_models.prompts((70,))
    theirs, past = [], DynamicCache()
    with torch.inference_mode():
        for token_id in prompt:
            # By place: the argument is called `past_key_values` or, from transformers 5.24 on, `cache`.
            output = both.oracle(torch.tensor([[token_id]]), None, None, past)
            theirs.append(output.logits[0, 0])
    for num_first in (70, 29):
        row, stepper = Row(list(prompt)), both.stepper()
        ours = [stepper.step([(row, num_first)], all_logits=True)]
        if num_first < 70:
            ours.append(stepper.step([(row, 70 - num_first)], all_logits=True))
        assert_close(torch.cat(ours), torch.stack(theirs))


def _rewrite_config(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"type": "linear", "factor": 3.0},
        tiny_models.LLAMA3 | {"original_max_position_embeddings": 64},
        {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128},
    ],
    ids=["default", "linear", "llama3", "yarn"],
)
def test_the_old_spelling_of_rope(scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path)

    def spell_as_of_old(config: dict[str, Any]) -> None:
        del config["rope_parameters"]
        config |= {"rope_theta": 3000.0, "rope_scaling": scaling, "torch_dtype": config.pop("dtype")}

    _rewrite_config(tmp_path, spell_as_of_old)
    _assert_same_after_prefill_and_decode(pair(tmp_path))


def test_a_rope_override_replaces_the_checkpoints_scaling(tmp_path: Path) -> None:
    yarn, linear = tmp_path / "yarn", tmp_path / "linear"
    tiny_models.save("llama", yarn, rope_parameters=tiny_models.ROPE | tiny_models.YARN)
    tiny_models.save(
        "llama", linear, rope_parameters=tiny_models.ROPE | {"rope_type": "linear", "factor": 2.5}
    )
    overridden = pair(yarn, rope_override=RopeOverride(factor=2.5)).loaded
    _assert_same_after_prefill_and_decode(Pair(overridden, pair(linear).oracle))


def test_a_checkpoint_in_several_files(tmp_path: Path) -> None:
    tiny_models.save("qwen3", tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    _assert_same_after_prefill_and_decode(pair(tmp_path))


def test_a_bare_export_without_prefix(tmp_path: Path) -> None:
    """The names of openai-community/gpt2, with the mask buffers of its time."""
    tiny_models.save("gpt2", tmp_path)
    oracle = pair(tmp_path).oracle
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}, file, metadata={"format": "pt"})
    loaded = load_model(tmp_path, dtype=None, device=CPU, group=SINGLE)
    _assert_same_after_prefill_and_decode(Pair(loaded, oracle))


@pytest.mark.parametrize("model_type", tiny_models.WITH_IMAGES)
@pytest.mark.parametrize("is_newer_order", [False, True], ids=["as published", "newer names"])
def test_the_text_model_of_a_model_that_takes_images(
    model_type: str, is_newer_order: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_models.save(model_type, tmp_path)
    oracle = tiny_models.oracle(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert any(name.startswith(("vision_tower.", "vision_model.")) for name in tensors)
    if is_newer_order:
        renamed = {_newer_name(name): tensor for name, tensor in tensors.items()}
        save_file(renamed, file, metadata={"format": "pt"})
    caplog.set_level("INFO")
    loaded = load_model(tmp_path, dtype=None, device=CPU, group=SINGLE)
    assert loaded.model_type == model_type
    assert caplog.text.count("images are not available yet") == 1
    assert "not used" not in caplog.text
    _assert_same_after_prefill_and_decode(Pair(loaded, oracle))


def _newer_name(name: str) -> str:
    """As transformers has called it for a while."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return f"model.{name.replace('language_model.model.', 'language_model.')}"


def test_a_tied_head_that_the_checkpoint_holds_with_other_values(tmp_path: Path) -> None:
    tiny_models.save("qwen2", tmp_path, tie_word_embeddings=False)
    _rewrite_config(tmp_path, lambda config: config.update(tie_word_embeddings=True))
    _assert_same_after_prefill_and_decode(pair(tmp_path))


def test_a_tied_embedding_saved_under_the_heads_name(tmp_path: Path) -> None:
    tiny_models.save("qwen2", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    _assert_same_after_prefill_and_decode(pair(tmp_path))


@pytest.mark.parametrize("model_type", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_near(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Against float32 on the same weights: no further off than 1.5 times what transformers is."""
    tiny_models.save(model_type, tmp_path, dtype=dtype)
    loaded = load_model(tmp_path, dtype=None, device=CPU, group=SINGLE)
    assert loaded.dtype == dtype
    prompts = tiny_models.prompts((7, 33))
    stepper = Stepper(loaded, block_size=BLOCK_SIZE)
    rows, logits = stepper.prefill(prompts)
    decoded = stepper.decode(rows, logits[[6, -1]])
    assert logits.dtype == torch.float32
    exact = tiny_models.oracle(tmp_path)
    rounded = tiny_models.oracle(tmp_path, dtype)
    with torch.inference_mode():
        for index, row in enumerate(rows):
            sequence = torch.tensor([row.token_ids])
            reference, theirs = exact(sequence).logits[0], rounded(sequence).logits[0].float()
            start = 7 * index
            ours = torch.cat([logits[start : start + len(prompts[index])], decoded[index : index + 1]])
            assert _error(ours, reference) < 1.5 * _error(theirs, reference)


def _error(logits: Tensor, reference: Tensor) -> float:
    """Of the token in the middle: rounding may choose another of two experts that are almost equally good."""
    return float((logits - reference).square().mean(-1).sqrt().median())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model_type", tiny_models.FAMILIES)
def test_a_cuda_device_computes_the_same(model_type: str, tmp_path: Path) -> None:
    device = torch.device("cuda")
    tiny_models.save(model_type, tmp_path)
    oracle = tiny_models.oracle(tmp_path)
    loaded = load_model(tmp_path, dtype=None, device=device, group=SINGLE)
    stepper = Stepper(loaded, block_size=64, device=device)
    rows, logits = stepper.prefill(tiny_models.prompts(LENGTHS))
    stepper.decode(rows, logits[torch.tensor(LENGTHS).cumsum(0) - 1])
    late = Row(tiny_models.prompts((300,))[0])
    stepper.step([(late, 30)])
    for row in rows:
        row.token_ids.append(0)
    mixed = stepper.step([(late, 270), *((row, 1) for row in rows)])
    with torch.inference_mode():
        expected = [oracle(torch.tensor([row.token_ids])).logits[0, -1] for row in (late, *rows)]
    torch.testing.assert_close(mixed.cpu(), torch.stack(expected), rtol=1e-3, atol=1e-3)
