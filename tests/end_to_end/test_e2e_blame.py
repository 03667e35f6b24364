"""A request that cannot be computed fails; who runs beside it notices nothing."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from conftest import Launch

POISON = "~"  # its embedding is NaN: whoever has it in the prompt gets scores that are NaN
PROMPTS = ("Once upon a time", "To be or not", "In the beginning")


@pytest.fixture(scope="module")
def poisonous(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, with one token that spoils everything after it."""
    path = tmp_path_factory.mktemp("poisonous")
    for file in tiny_llama.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    weights = load_file(path / "model.safetensors")
    poison_id = Tokenizer.from_file(str(path / "tokenizer.json")).token_to_id(POISON)
    weights["model.embed_tokens.weight"][poison_id] = float("nan")
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def test_scores_that_are_not_finite_cost_their_own_request_alone(launch: Launch, poisonous: Path) -> None:
    with launch(model=str(poisonous)) as server:
        parameters = {"max_new_tokens": 100}  # greedy: none of them utters the poison
        undisturbed = [server.text(prompt, **parameters) for prompt in PROMPTS]
        with ThreadPoolExecutor(2 * len(PROMPTS)) as pool:
            texts = [pool.submit(server.text, prompt, **parameters) for prompt in PROMPTS]
            bodies = [{"inputs": f"{prompt} {POISON} and so on"} for prompt in PROMPTS]
            answers = list(pool.map(lambda body: server.client.post("/generate", json=body), bodies))
        for answer in answers:
            assert answer.status_code == 424
            assert "the model's scores for this sequence are not finite" in answer.json()["error"]
        assert [text.result() for text in texts] == undisturbed
        assert server.metric("tgi_recoveries") == 0
        server.wait_for_metric("tgi_kv_blocks_used", 0)
        assert server.text(PROMPTS[0], **parameters) == undisturbed[0]
