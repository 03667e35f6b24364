"""The download step against a stand-in for the hub, with the hub's real client in between."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fake_hub
import tiny_models
from fake_hub import FakeHub
from tgi_shard import hub as hub_module
from tgi_shard.hub import Hub
from tgi_shard.model_folder import ModelError
from tgi_shard.prepare import prepare_model

MODEL = "acme/tiny"
COMMIT = "a" * 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two weight files with an index, a chat template, and what a repository holds besides."""
    folder = tiny_models.save("llama", tmp_path_factory.mktemp("llama"), max_shard_size="250KB")
    assert (folder / "model.safetensors.index.json").is_file()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "README.md").write_text("for people")
    (folder / "modeling_tiny.py").write_text("raise SystemExit")
    (folder / "training_args.bin").write_bytes(b"no weights")
    (folder / "consolidated.safetensors").write_bytes(b"the weights once more")
    return folder


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with fake_hub.running() as running:
        yield running


@pytest.fixture
def hub(server: FakeHub, tmp_path: Path) -> Hub:
    return Hub(tmp_path / "cache", endpoint=server.url, retry_wait_s=0.01)


def prepare(hub: Hub, model_id: str = MODEL, revision: str | None = None, **options: bool) -> Path:
    return prepare_model(hub, model_id, revision, **{"trust_remote_code": False} | options)  # type: ignore[arg-type]


def names(folder: Path) -> set[str]:
    found = [Path(top) / file for top, _, files in os.walk(folder, followlinks=True) for file in files]
    return {str(path.relative_to(folder)) for path in found}


def test_a_download_is_complete_and_brings_nothing_else(server: FakeHub, hub: Hub, checkpoint: Path) -> None:
    server.add(MODEL, checkpoint)
    folder = prepare(hub)
    left_out = {"README.md", "modeling_tiny.py", "training_args.bin", "consolidated.safetensors"}
    assert names(folder) == names(checkpoint) - left_out
    assert all((folder / name).read_bytes() == (checkpoint / name).read_bytes() for name in names(folder))


def test_code_comes_only_when_it_is_trusted(server: FakeHub, hub: Hub, checkpoint: Path) -> None:
    server.add(MODEL, checkpoint)
    assert "modeling_tiny.py" in names(prepare(hub, trust_remote_code=True))


def test_a_second_start_fetches_nothing(
    server: FakeHub, hub: Hub, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.add(MODEL, checkpoint)
    first = prepare(hub)
    server.requests.clear()
    with caplog.at_level(logging.INFO):
        assert prepare(hub) == first
    assert not [line for line in server.requests if line.startswith("GET") and "/resolve/" in line]
    assert "Files are already present on the host. Skipping download." in caplog.text


def test_an_offline_start_finds_what_was_downloaded(server: FakeHub, hub: Hub, checkpoint: Path) -> None:
    server.add(MODEL, checkpoint)
    folder = prepare(hub)
    server.requests.clear()
    assert prepare(replace(hub, offline=True)) == folder
    assert hub_module.locate(hub, MODEL, None) == folder
    assert server.requests == []


def test_offline_and_never_downloaded_is_an_error(hub: Hub) -> None:
    with pytest.raises(
        ModelError, match=r"HF_HUB_OFFLINE is set, and model acme/tiny at revision main is not"
    ):
        prepare(replace(hub, offline=True))
    with pytest.raises(ModelError, match="text-generation-server download-weights acme/tiny"):
        hub_module.locate(hub, MODEL, None)


def test_without_network_the_cache_is_used(server: FakeHub, hub: Hub, checkpoint: Path) -> None:
    server.add(MODEL, checkpoint)
    folder = prepare(hub)
    unreachable = replace(hub, endpoint="http://127.0.0.1:9", max_attempts=2)
    assert prepare(unreachable) == folder
    with pytest.raises(ModelError, match="The hub cannot be reached"):
        prepare(unreachable, "acme/other")


def test_an_interrupted_download_is_not_taken_for_a_whole_one(
    server: FakeHub, hub: Hub, checkpoint: Path
) -> None:
    server.add(MODEL, checkpoint)
    last = max(name for name in names(checkpoint) if name.startswith("model-"))
    server.failures[last] = 1000
    with pytest.raises(ModelError, match="could not be downloaded"):
        prepare(hub)
    with pytest.raises(ModelError, match="not wholly"):
        prepare(replace(hub, offline=True))
    with pytest.raises(ModelError, match="not wholly"):  # neither by the commit that was half downloaded
        prepare(replace(hub, offline=True), revision=COMMIT)
    server.failures.clear()
    server.requests.clear()
    assert last in names(prepare(hub))
    assert server.num_fetched("model-00001-of-00002.safetensors") == 0, (
        "the finished file is not fetched again"
    )


def test_a_hub_that_fails_for_a_moment_is_asked_again(
    server: FakeHub, hub: Hub, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.add(MODEL, checkpoint)
    server.failures = {"config.json": 2, "model-00001-of-00002.safetensors": 4}
    with caplog.at_level(logging.INFO):
        prepare(hub)
    assert caplog.text.count("Retrying in 0.01 seconds") == 6
    assert "Retry 4/4" in caplog.text


def test_no_attempt_starts_after_the_deadline(server: FakeHub, hub: Hub, checkpoint: Path) -> None:
    server.add(MODEL, checkpoint)
    server.failures["config.json"] = 1000
    with pytest.raises(ModelError, match="could not be downloaded"):
        prepare(replace(hub, retry_deadline_s=0.0))
    assert server.num_fetched("config.json") == 1


def test_a_broken_connection_goes_on_where_it_broke(server: FakeHub, hub: Hub, checkpoint: Path) -> None:
    server.add(MODEL, checkpoint)
    server.cuts["model-00001-of-00002.safetensors"] = 1
    folder = prepare(hub)
    name = "model-00001-of-00002.safetensors"
    assert (folder / name).read_bytes() == (checkpoint / name).read_bytes()


def test_revisions(server: FakeHub, hub: Hub, checkpoint: Path) -> None:
    server.add(MODEL, checkpoint, revisions={"main": COMMIT, "v2": "b" * 40, "refs/pr/1": "c" * 40})
    assert prepare(hub, revision="v2").name == "b" * 40
    assert prepare(hub, revision="refs/pr/1").name == "c" * 40
    assert prepare(hub, revision="b" * 40).name == "b" * 40
    assert prepare(replace(hub, offline=True), revision="refs/pr/1").name == "c" * 40
    with pytest.raises(ModelError, match="has no revision v3"):
        prepare(hub, revision="v3")
    with pytest.raises(ModelError, match="at revision main is not"):
        prepare(replace(hub, offline=True))


def test_a_model_that_is_not_there(hub: Hub) -> None:
    with pytest.raises(ModelError, match=r"Model acme/nothing was not found: there is no such folder"):
        prepare(hub, "acme/nothing")
    with pytest.raises(ModelError, match="neither a folder on this machine nor a valid hub id"):
        prepare(hub, "/no/such/folder")


def test_a_private_model_needs_its_token(server: FakeHub, hub: Hub, checkpoint: Path) -> None:
    server.add(MODEL, checkpoint, token="sesame")
    with pytest.raises(ModelError, match="HF_TOKEN"):
        prepare(hub)
    assert prepare(replace(hub, token="sesame")).is_dir()


def test_a_gated_model_says_what_to_do(server: FakeHub, hub: Hub, checkpoint: Path) -> None:
    server.add(MODEL, checkpoint, gated=True)
    with pytest.raises(ModelError, match="Access to model acme/tiny is restricted"):
        prepare(hub)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", {"peft_type": "LORA"}, "acme/tiny is a PEFT adapter: .* not available yet"),
        ("config.json", {"medusa_num_heads": 3}, "Medusa is not available yet"),
        ("config.json", {"model_type": "mlp_speculator"}, "MLP is not available yet"),
    ],
)
def test_parts_of_models_are_refused_before_their_weights_are_fetched(
    server: FakeHub, hub: Hub, tmp_path: Path, file: str, content: dict[str, object], message: str
) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / file).write_text(json.dumps(content))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    server.add(MODEL, folder)
    with pytest.raises(ModelError, match=message):
        prepare(hub)
    assert server.num_fetched("adapter_model.safetensors") == 0
    with pytest.raises(ModelError, match="not available yet"):
        prepare(hub, str(folder))


def test_a_repository_without_weights(server: FakeHub, hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    server.add(MODEL, folder)
    with pytest.raises(
        ModelError, match=r"No \.safetensors weights found for model acme/tiny and revision main\."
    ):
        prepare(hub)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        prepare(hub)


def test_pytorch_weights_are_fetched_and_converted(
    server: FakeHub, hub: Hub, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights: dict[str, torch.Tensor] = {}
    for i, file in enumerate(sorted(checkpoint.glob("model-*.safetensors"))):
        weights |= load_file(file)
        torch.save(load_file(file), folder / f"pytorch_model-0000{i + 1}-of-00002.bin")
    server.add(MODEL, folder)
    with caplog.at_level(logging.INFO):
        prepared = prepare(hub)
    assert "Downloading PyTorch weights." in caplog.text
    assert "Convert: [2/2] -- Took: " in caplog.text
    converted = load_file(prepared / "model-00001-of-00002.safetensors")
    converted |= load_file(prepared / "model-00002-of-00002.safetensors")
    torch.testing.assert_close(converted, weights, rtol=0, atol=0)
    assert prepare(replace(hub, offline=True)) == prepared
    with pytest.raises(ModelError, match=r"No \.safetensors weights found"):
        prepare(replace(hub, cache_dir=tmp_path / "other"), auto_convert=False)


def test_a_local_folder_is_taken_as_it_is(
    hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    before = names(checkpoint)
    assert prepare(hub, checkpoint.name) == checkpoint.resolve()
    assert hub_module.locate(hub, checkpoint.name, None) == checkpoint.resolve()
    assert names(checkpoint) == before
    assert not hub.cache_dir.exists()


def test_weights_from_another_folder(server: FakeHub, hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    server.add(MODEL, checkpoint)
    elsewhere = tmp_path / "weights"
    elsewhere.mkdir()
    for file in checkpoint.glob("model-*.safetensors"):
        shutil.copy(file, elsewhere)
    folder = prepare_model(hub, MODEL, None, trust_remote_code=False, weights_override=elsewhere)
    assert {"config.json", "tokenizer.json", "additional_chat_templates/tools.jinja"} <= names(folder)
    assert (folder / "model-00001-of-00002.safetensors").resolve().parent == elsewhere
    assert server.num_fetched("model-00001-of-00002.safetensors") == 0
    assert prepare_model(hub, MODEL, None, trust_remote_code=False, weights_override=elsewhere) == folder
    (elsewhere / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"File model-00002-of-00002\.safetensors not found in "):
        prepare_model(hub, MODEL, None, trust_remote_code=False, weights_override=elsewhere)


def test_tokenizer_json_is_made_from_an_older_format(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    folder = _with_gpt2_vocabulary(checkpoint, tmp_path / "model")
    assert prepare(hub, str(folder)) == folder
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert made.encode("the hat").tokens == ["the", "Ġ", "h", "a", "t"]


def test_what_is_made_for_a_read_only_folder_lies_in_the_cache(
    hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = _with_gpt2_vocabulary(checkpoint, tmp_path / "model")
    monkeypatch.setattr("tgi_shard.model_folder.is_writable", lambda _: False)
    prepared = prepare(hub, str(folder))
    assert prepared.is_relative_to(hub.cache_dir)
    assert names(prepared) == names(folder) | {"tokenizer.json"}
    assert (prepared / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert prepare(hub, str(folder)) == prepared


def test_a_model_without_any_tokenizer(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    folder = _with_gpt2_vocabulary(checkpoint, tmp_path / "model")
    (folder / "vocab.json").unlink()
    with pytest.raises(
        ModelError, match=r"There is no tokenizer in .*: neither tokenizer\.json nor an older format"
    ):
        prepare(hub, str(folder))


def test_progress_tells_rate_and_remaining_time(
    server: FakeHub,
    hub: Hub,
    checkpoint: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.add(MODEL, checkpoint)
    server.failures["model-00002-of-00002.safetensors"] = 3
    with caplog.at_level(logging.INFO):
        prepare(replace(hub, progress_every_s=0.02, retry_wait_s=0.1))
    lines = [record.message for record in caplog.records if record.message.startswith("Download: ")]
    assert any(" MB/s -- ETA: 0:00:0" in line for line in lines)
    assert "Download: [2/2] -- ETA: 0:00:00" in lines


def _with_gpt2_vocabulary(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint with GPT-2's tokenizer format (vocab.json and merges.txt) in place of tokenizer.json."""
    ignored = shutil.ignore_patterns("tokenizer*", "chat_template*")
    shutil.copytree(checkpoint, folder, ignore=ignored)
    bpe = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    merges = [*(" ".join(pair) for pair in bpe["merges"]), "t h", "th e"]
    vocabulary = bpe["vocab"] | {"th": 300, "the": 301, "<|endoftext|>": 302}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    return folder
