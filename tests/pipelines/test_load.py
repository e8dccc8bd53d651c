"""Every problem with a checkpoint is reported in one sentence that names the entry and the file."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from jobs.errors import ConfigurationError, ModelUnavailable
from pipelines.families import make_family
from pipelines.load import load_pipeline, read_card
from pipelines.loading.checkpoint import find_checkpoint
from tests.pipelines.serving import entry
from tests.pipelines.tiny import BUILDERS


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder("FluxGuidance"), tmp_path / "model"))


def refusal(model) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        load_pipeline(model, "cpu")
    message = str(caught.value)
    assert "'tiny'" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", BUILDERS)
def test_the_card_is_read_without_the_weights(tiny_folder, name, monkeypatch):
    def no_weights(pipe, length):
        models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        assert {t.device.type for part in models for t in part.parameters()} == {"meta"}
        return make_family(pipe, length)

    model = entry(tiny_folder(name))
    pipeline = load_pipeline(model, "cpu")
    monkeypatch.setattr("pipelines.loaders.make_family", no_weights)
    assert read_card(model) == (pipeline.card, pipeline.tokenizer_json())


def test_no_folder(tmp_path):
    assert str(tmp_path / "nowhere") in refusal(entry(tmp_path / "nowhere"))


def test_no_index(tmp_path):
    assert "model_index.json is missing" in refusal(entry(tmp_path))


def test_unreadable_index(folder):
    (folder / "model_index.json").write_text('{"_class_name": "Flux')
    message = refusal(entry(folder))
    assert f"can't read {folder / 'model_index.json'}" in message


@pytest.mark.parametrize("index", ["{}", '{"_class_name": ["mine", "Custom"]}'])
def test_an_index_without_a_diffusers_class(folder, index):
    (folder / "model_index.json").write_text(index)
    assert "_class_name" in refusal(entry(folder))


def test_a_pipeline_that_diffusers_does_not_have(folder):
    path = folder / "model_index.json"
    path.write_text(path.read_text().replace("FluxPipeline", "TomorrowPipeline"))
    assert "no pipeline 'TomorrowPipeline'" in refusal(entry(folder))


def test_a_missing_component_folder(folder):
    shutil.rmtree(folder / "vae")
    message = refusal(entry(folder))
    assert f"{folder / 'vae'} is missing" in message
    assert "AutoencoderKL" in message


@pytest.mark.parametrize("name", ["transformer/config.json", "scheduler/scheduler_config.json"])
def test_a_missing_config(folder, name):
    (folder / name).unlink()
    assert f"{folder / name} is missing" in refusal(entry(folder))


def test_a_damaged_config(folder):
    (folder / "text_encoder" / "config.json").write_bytes(b"\xff\xfe\x00")
    assert f"can't read {folder / 'text_encoder' / 'config.json'}" in refusal(entry(folder))


def test_truncated_weights(folder):
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert f"{weights} is truncated or corrupt" in refusal(entry(folder))


def test_weights_that_git_lfs_never_fetched(folder):
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 7\n")
    assert f"{weights} is only a Git LFS pointer" in refusal(entry(folder))


def test_no_weights(folder):
    (folder / "text_encoder_2" / "model.safetensors").unlink()
    assert f"{folder / 'text_encoder_2'} has no weights" in refusal(entry(folder))


def test_a_missing_shard(folder):
    index = {"metadata": {}, "weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    transformer = folder / "transformer"
    name = "diffusion_pytorch_model.safetensors"
    (transformer / name).rename(transformer / "part-1.safetensors")
    (transformer / f"{name}.index.json").write_text(json.dumps(index))
    assert f"{transformer / 'part-2.safetensors'} is missing" in refusal(entry(folder))


def test_weights_of_another_shape(folder):
    path = folder / "transformer" / "config.json"
    path.write_text(path.read_text().replace('"num_single_layers": 2', '"num_single_layers": "x"'))
    assert f"can't load {folder}" in refusal(entry(folder))


def test_a_variant_that_is_not_there(folder):
    assert "variant" in refusal(entry(folder, variant="fp16"))


def test_a_hub_model_that_is_neither_cached_nor_reachable(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = refusal(entry("somebody/some-model", local=False))
    assert "'somebody/some-model' isn't in the local cache" in message
    assert "the hub can't be reached" in message


def test_a_hub_model_from_the_cache(monkeypatch, folder):
    def download(path, revision, variant, use_safetensors):
        assert (path, revision, variant) == ("somebody/flux", "main", None)
        assert use_safetensors  # no pickles
        return folder

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    checkpoint = find_checkpoint(entry("somebody/flux", local=False, revision="main"))
    assert (checkpoint.folder, checkpoint.class_name) == (folder, "FluxPipeline")


def test_a_placement_that_is_not_here(tmp_path):
    with pytest.raises(ConfigurationError, match=r"'tiny'.*unknown placement 'elsewhere'.*replica"):
        load_pipeline(entry(tmp_path, placement="elsewhere"), "cpu")


def test_an_attention_backend_that_does_not_exist(folder):
    with pytest.raises(ConfigurationError, match=r"'tiny': attention_backend 'nonsense'"):
        load_pipeline(entry(folder, attention_backend="nonsense"), "cpu")


def test_dtype_of_the_entry(folder):
    pipeline = load_pipeline(entry(folder, dtype="bfloat16"), "cpu")
    assert pipeline.family.pipe.transformer.dtype == torch.bfloat16
    assert pipeline.card.family == "flux"
