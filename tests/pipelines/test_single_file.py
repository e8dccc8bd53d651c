"""Single files give the folder's picture bit for bit; a GGUF gives the dequantized model's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from jobs.catalog import Model
from jobs.errors import ConfigurationError, ModelUnavailable
from pipelines.load import load_pipeline, read_card
from tests.pipelines.serving import alone, ask, entry
from tests.pipelines.tiny_files import (
    DENOISER,
    dequantized,
    prefixed,
    save_gguf,
    save_single,
    without_weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

REQUEST = ask(steps=2)
FILES = {
    "SD15": ("unet", "vae", "text_encoder"),
    "SDXL": ("unet", "vae", "text_encoder", "text_encoder_2"),
    "SD3": ("transformer", "vae", "text_encoder_3"),
    "Flux": ("transformer",),
    "Flux2Klein": ("transformer",),
    "QwenImage": ("transformer",),
    "ZImage": ("transformer",),
}
"""The components in each family's usual file."""


@pytest.fixture(scope="module")
def picture(tiny_folder):
    """The picture of a tiny folder by name."""
    pictures: dict[str, torch.Tensor] = {}

    def of(name: str) -> torch.Tensor:
        if name not in pictures:
            pictures[name] = drawn(entry(tiny_folder(name), **short(name)))
        return pictures[name]

    return of


def drawn(model: Model) -> torch.Tensor:
    """The picture of a model whose weights were copied to newly allocated memory.

    In a file's mapping they start at any address, and torch's kernels round by its alignment.
    """
    return alone(in_own_memory(load_pipeline(model, "cpu")), REQUEST)


def in_own_memory(pipeline: Any) -> Any:
    for component in pipeline.family.pipe.components.values():
        if isinstance(component, torch.nn.Module):
            for tensor in (*component.parameters(), *component.buffers()):
                tensor.data = tensor.data.clone()
    return pipeline


def short(name: str) -> dict[str, int]:
    """Limits that keep the tiny models' prompts short."""
    return {"max_sequence_length": 48} if name in ("Flux", "SD3") else {}


@pytest.mark.parametrize("name", FILES)
def test_a_single_file_gives_the_folders_picture(tiny_folder, picture, tmp_path, name):
    folder = without_weights(tiny_folder(name), tmp_path / "configs", FILES[name])
    path = save_single(name, tiny_folder(name), tmp_path / "model.safetensors")
    model = entry(path, config=str(folder), **short(name))
    pipeline = load_pipeline(model, "cpu")
    assert torch.equal(alone(in_own_memory(pipeline), REQUEST), picture(name))
    assert read_card(model) == (pipeline.card, pipeline.tokenizer_json())


@pytest.fixture
def configs(tiny_folder, tmp_path):
    """A tiny folder without its transformer's weights."""

    def of(name: str) -> str:
        folder = without_weights(tiny_folder(name), tmp_path / f"{name} configs", ["transformer"])
        return str(folder)

    return of


def transformer_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", ["SD3", "Flux2Klein", "QwenImage", "ZImage"])
@pytest.mark.parametrize("is_prefixed", [True, False])
def test_a_denoisers_file_may_have_the_prefix_of_a_whole_checkpoint(
    tiny_folder, picture, configs, tmp_path, name, is_prefixed
):
    path = save_single(name, tiny_folder(name), tmp_path / "model.safetensors")
    tensors = {
        key.removeprefix(DENOISER): tensor
        for key, tensor in load_file(path).items()
        if name != "SD3" or key.startswith(DENOISER)
    }
    save_file(prefixed(DENOISER, tensors) if is_prefixed else tensors, path)
    model = entry(path, config=configs(name), **short(name))
    assert torch.equal(drawn(model), picture(name))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("name", ["Flux", "QwenImage", "ZImage"])
def test_a_gguf_gives_the_dequantized_models_picture(
    tiny_folder, picture, configs, tmp_path, name, kind
):
    tensors = transformer_of(tiny_folder(name))
    path = save_gguf(tensors, tmp_path / "model.gguf", kind)
    model = entry(path, config=configs(name), **short(name))
    drawn_picture = drawn(model)
    same = tmp_path / "dequantized.safetensors"
    save_file(dequantized(path), same)
    assert torch.equal(drawn_picture, drawn(replace(model, path=str(same))))
    assert not torch.equal(drawn_picture, picture(name))


def test_a_ggufs_quantized_tensors_outside_linear_layers_are_dequantized(
    tiny_folder, configs, tmp_path
):
    """Norms and biases in bfloat16: diffusers would use their bytes as numbers."""
    tensors = transformer_of(tiny_folder("Flux"))
    path = save_gguf(tensors, tmp_path / "model.gguf", "BF16", everything=True)
    model = entry(path, config=configs("Flux"), **short("Flux"))
    drawn_picture = drawn(model)
    same = tmp_path / "dequantized.safetensors"
    save_file(dequantized(path), same)
    assert torch.equal(drawn_picture, drawn(replace(model, path=str(same))))


def test_components_come_from_files_folders_and_other_pipelines(tiny_folder, picture, tmp_path):
    """The file only has the transformer, and the folder only has configs."""
    whole = tiny_folder("Flux")
    names = ("transformer", "vae", "text_encoder", "text_encoder_2")
    folder = without_weights(whole, tmp_path / "configs", names)
    path = save_single("Flux", whole, tmp_path / "model.safetensors")
    components = {
        "vae": str(whole),
        "text_encoder": str(whole / "text_encoder"),
        "text_encoder_2": str(whole / "text_encoder_2" / "model.safetensors"),
    }
    model = entry(path, config=str(folder), components=components, **short("Flux"))
    assert torch.equal(drawn(model), picture("Flux"))
    model = replace(model, components={"vae": str(whole)})
    with pytest.raises(
        ModelUnavailable,
        match=r"has text_encoder or text_encoder_2; set components = \{ text_encoder = ",
    ):
        load_pipeline(model, "cpu")


def test_components_replace_those_of_a_folder(tiny_folder, picture, tmp_path):
    """A GGUF, and a VAE with its original names."""
    whole = tiny_folder("SD3")
    path = save_single("SD3", whole, tmp_path / "all.safetensors")
    vae = {k: t for k, t in load_file(path).items() if k.startswith("first_stage_model.")}
    save_file({k.partition(".")[2]: t for k, t in vae.items()}, tmp_path / "vae.safetensors")
    components = {"vae": str(tmp_path / "vae.safetensors")}
    model = entry(whole, components=components, **short("SD3"))
    assert torch.equal(drawn(model), picture("SD3"))
    gguf = save_gguf(transformer_of(whole), tmp_path / "model.gguf", "Q8_0", "sd3")
    model = replace(model, components=components | {"transformer": str(gguf)})
    change = (drawn(model) - picture("SD3")).abs().max().item()
    assert 0 < change < 0.05


def test_a_component_is_left_out_with_its_tokenizer(tiny_folder, tmp_path):
    """Like None in diffusers."""
    model = entry(tiny_folder("SD3"), components={"text_encoder_3": None}, **short("SD3"))
    pipeline = load_pipeline(model, "cpu")
    pipe = pipeline.family.pipe
    assert pipe.text_encoder_3 is None and pipe.tokenizer_3 is None
    assert pipeline.card.max_prompt_tokens == 77
    same = DiffusionPipeline.from_pretrained(
        tiny_folder("SD3"), text_encoder_3=None, tokenizer_3=None
    )
    same.save_pretrained(tmp_path)
    assert torch.equal(drawn(model), drawn(entry(tmp_path, **short("SD3"))))


def test_the_error_names_an_unknown_component(tiny_folder):
    model = entry(tiny_folder("Flux"), components={"vea": None})
    with pytest.raises(
        ModelUnavailable, match="'tiny': components: FluxPipeline has no 'vea'; expected"
    ):
        load_pipeline(model, "cpu")


def test_a_stored_quantization_is_not_quantized_again(tiny_folder, configs, tmp_path):
    path = save_gguf(transformer_of(tiny_folder("Flux")), tmp_path / "model.gguf", "Q8_0")
    model = entry(path, config=configs("Flux"), quantization="int8")
    with pytest.raises(
        ConfigurationError, match=r"quantization 'int8': .*already quantized \(Q8_0"
    ):
        load_pipeline(model, "cpu")
