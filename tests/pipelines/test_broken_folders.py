"""Every broken folder raises an error of one sentence that names the file and the fix."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.errors import ModelUnavailable
from pipelines.load import load_pipeline, resolve_defaults
from pipelines.loading.checkpoint import find_checkpoint, look_over
from tests.pipelines.serving import ask, begin, entry
from tests.pipelines.tiny import BUILDERS

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 7\n"


@pytest.fixture
def folder(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("FluxGuidance"), tmp_path / "model"))


def write(path: Path, document: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


def index(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def sharded(folder: Path) -> tuple[Path, Path]:
    """Split the transformer's weights into two shards; returns their paths."""
    weights = load_file(folder / TRANSFORMER)
    (folder / TRANSFORMER).unlink()
    names = sorted(weights)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    paths, weight_map = [], {}
    for number, half in enumerate(halves, start=1):
        path = folder / "transformer" / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in half}, path)
        weight_map |= dict.fromkeys(half, path.name)
        paths.append(path)
    write(folder / f"{TRANSFORMER}.index.json", {"metadata": {}, "weight_map": weight_map})
    return paths[0], paths[1]


def fp16_only(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))


def lora(folder: Path) -> None:
    path = emptied(folder) / "pytorch_lora_weights.safetensors"
    save_file({"transformer.blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 8)}, path)


def pickled(folder: Path) -> None:
    (folder / TRANSFORMER).rename(folder / "transformer" / "diffusion_pytorch_model.bin")


def component_alone(folder: Path) -> None:
    alone = shutil.copytree(folder / "transformer", folder.with_name("alone"))
    shutil.rmtree(folder)
    alone.rename(folder)


def folder_above(folder: Path) -> None:
    moved = folder.rename(folder.with_name("moved"))
    folder.mkdir()
    moved.rename(folder / "deep")


def transformer_only(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "transformer":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def whole_numbers(folder: Path) -> None:
    weights = load_file(folder / TRANSFORMER)
    save_file({name: value.to(torch.int8) for name, value in weights.items()}, folder / TRANSFORMER)


def without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / TRANSFORMER)
    del weights["proj_out.weight"]
    save_file(weights, folder / TRANSFORMER)


def dangling(folder: Path) -> None:
    (folder / TRANSFORMER).unlink()
    (folder / TRANSFORMER).symlink_to(folder / "blobs" / "abc")


def a_folder_for_a_file(folder: Path) -> None:
    (folder / TRANSFORMER).unlink()
    (folder / TRANSFORMER).mkdir()


def config_alone(config: dict[str, Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        write(emptied(folder) / "config.json", config)

    return damage


BROKEN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "empty": (emptied, ["model_index.json is missing", "empty; download"]),
    "not there": (shutil.rmtree, ["the folder {folder} doesn't exist"]),
    "a folder above": (folder_above, ["set path to {folder}/deep"]),
    "a component by itself": (component_alone, ["only a FluxTransformer2DModel", "whole model"]),
    "a transformer only": (transformer_only, ["has only transformer", "download the whole"]),
    "LoRA weights": (lora, ["LoRA weights", "set path to a model"]),
    "a LoRA of PEFT": (
        lambda f: write(emptied(f) / "adapter_config.json", {"peft_type": "LORA"}),
        ["LoRA weights"],
    ),
    "a ControlNet": (
        config_alone({"_class_name": "FluxControlNetModel"}),
        ["ControlNet", "set path to a model"],
    ),
    "a language model": (
        config_alone({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
        ["LlamaForCausalLM", "doesn't generate images", "diffusers folder"],
    ),
    "a modular pipeline": (
        lambda f: (f / "model_index.json").rename(f / "modular_model_index.json"),
        ["modular pipeline", "plain folder"],
    ),
    "a single file in a folder": (
        lambda f: save_file({"a": torch.zeros(1)}, emptied(f) / "flux.safetensors"),
        ["set path to {folder}/flux.safetensors"],
    ),
    "a pickle in a folder": (
        lambda f: write(emptied(f) / "sd.ckpt", "x"),
        ["sd.ckpt is a pickle", "safetensors"],
    ),
    "something else": (
        lambda f: write(emptied(f) / "notes.txt", "x"),
        ["model_index.json is missing", "isn't a diffusers folder"],
    ),
    "a damaged index": (
        lambda f: write(f / "model_index.json", '{"_class_name": "Flux'),
        ["can't read {folder}/model_index.json", "download it again"],
    ),
    "an index of another kind": (
        lambda f: write(f / "model_index.json", ["FluxPipeline"]),
        ["model_index.json isn't a JSON object"],
    ),
    "an index that LFS never fetched": (
        lambda f: write(f / "model_index.json", POINTER),
        ["model_index.json is only a Git LFS pointer", "git lfs pull"],
    ),
    "a newer class": (
        lambda f: index(f, _class_name="TomorrowPipeline", _diffusers_version="99.0.0"),
        ["no pipeline 'TomorrowPipeline'", "diffusers 99.0.0 saved", "upgrade diffusers"],
    ),
    "a class that isn't a pipeline": (
        lambda f: index(f, _class_name="UNet2DConditionModel"),
        ["no pipeline 'UNet2DConditionModel'", "model_index.json"],
    ),
    "a class without prompts": (
        lambda f: index(f, _class_name="DDPMPipeline"),
        ["DDPMPipeline", "model_index.json", "takes no prompt", "text-to-image"],
    ),
    "a video model": (
        lambda f: index(f, _class_name="StableVideoDiffusionPipeline"),
        ["StableVideoDiffusionPipeline", "takes no prompt", "text-to-image"],
    ),
    "a damaged config": (
        lambda f: write(f / "vae" / "config.json", "{"),
        ["can't read {folder}/vae/config.json", "download it again"],
    ),
    "a damaged scheduler": (
        lambda f: write(f / "scheduler" / "scheduler_config.json", "[]"),
        ["scheduler_config.json isn't a JSON object"],
    ),
    "a missing config": (
        lambda f: (f / "transformer" / "config.json").unlink(),
        ["transformer/config.json is missing", "download"],
    ),
    "pickled weights": (
        pickled,
        ["diffusion_pytorch_model.bin is a pickle", "safetensors version"],
    ),
    "weights that LFS never fetched": (
        lambda f: write(f / TRANSFORMER, POINTER),
        [TRANSFORMER, "Git LFS pointer", "git lfs pull"],
    ),
    "cut weights": (
        lambda f: cut(f / TRANSFORMER),
        [TRANSFORMER, "is truncated or corrupt", "download it again"],
    ),
    "a cut shard": (
        lambda f: cut(sharded(f)[1]),
        ["00002-of-00002.safetensors is truncated or corrupt", "download it again"],
    ),
    "a missing shard": (
        lambda f: sharded(f)[0].unlink(),
        ["00001-of-00002.safetensors is missing", "index.json lists it"],
    ),
    "shards without a map": (
        lambda f: sharded(f) and write(f / f"{TRANSFORMER}.index.json", {"metadata": {}}),
        ["index.json has no weight_map", "download it again"],
    ),
    "only fp16": (fp16_only, ["'fp16'", 'set variant = "fp16"']),
    "whole numbers": (whole_numbers, [TRANSFORMER, "I8", "no quantization_config", "float16"]),
    "a tensor too few": (
        without_a_tensor,
        ["{folder}/transformer are missing proj_out.weight", "download the whole model"],
    ),
    "a dangling link": (
        dangling,
        [TRANSFORMER, "is a broken link to {folder}/blobs/abc", "download"],
    ),
    "a folder for a file": (a_folder_for_a_file, [TRANSFORMER, "isn't a file"]),
}


def refusal(path: Path, **fields: Any) -> str:
    model = entry(path, **fields)
    with pytest.raises(ModelUnavailable) as caught:
        load_pipeline(model, "cpu")
    message = str(caught.value)
    assert message.startswith("model 'tiny': ") and "\n" not in message
    return message


@pytest.mark.parametrize("case", BROKEN)
def test_the_error_for_a_broken_folder_names_it_and_the_fix(folder: Path, case: str) -> None:
    damage, parts = BROKEN[case]
    damage(folder)
    message = refusal(folder)
    assert str(folder) in message
    assert [part for part in parts if part.format(folder=folder) not in message] == [], message


def test_the_error_for_a_components_folder_names_the_models_folder(folder: Path) -> None:
    assert f"set path to {folder}" in refusal(folder / "transformer")


def test_a_variant_that_is_not_there(folder: Path) -> None:
    assert "no weights of variant 'fp8'; leave variant out" in refusal(folder, variant="fp8")
    fp16_only(folder)
    assert 'set variant = "fp16"' in refusal(folder, variant="fp8")


def test_fp16_shards_are_accepted_if_the_entry_sets_the_variant(folder: Path) -> None:
    fp16_only(folder)
    look_over(entry(folder, variant="fp16"), find_checkpoint(entry(folder, variant="fp16")))


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("guider", ["diffusers", "ClassifierFreeGuidance"]),
        ("feature_extractor", ["transformers", "CLIPImageProcessorPil"]),
        ("tokenizer", ["transformers", "TokenizersBackend"]),
        ("custom", ["nowhere", "Custom"]),
    ],
)
def test_only_modules_need_a_config_and_weights(folder: Path, name: str, listed: list) -> None:
    index(folder, **{name: listed})
    (folder / name).mkdir(exist_ok=True)
    look_over(entry(folder), find_checkpoint(entry(folder)))


def test_sd3_without_t5(tmp_path: Path) -> None:
    pipe = BUILDERS["SD3"]()
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path)
    index(tmp_path, text_encoder_3=[None, None], tokenizer_3=[None, None])
    pipeline = load_pipeline(entry(tmp_path), "cpu")
    assert begin(pipeline, ask()).latents is not None


def test_resolving_defaults_of_a_damaged_folder_raises_the_same_error(folder: Path) -> None:
    write(folder / "scheduler" / "scheduler_config.json", "{")
    with pytest.raises(ModelUnavailable, match=r"can\'t read .*scheduler_config\.json"):
        resolve_defaults(entry(folder, unset=("steps",)))
