"""Files that aren't supported models are refused before loading, with advice in one sentence."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.errors import ConfigurationError, ModelUnavailable
from pipelines.load import load_pipeline, read_card
from pipelines.loading import headers
from pipelines.loading.checkpoint import find_checkpoint
from tests.pipelines.serving import entry
from tests.pipelines.tiny_files import clip, save_gguf, save_single, vae, without_weights

Made = tuple[Path, str]
NAME = "model.safetensors"


@pytest.fixture(scope="module")
def flux(tiny_folder, tmp_path_factory):
    """A tiny Flux: a folder of configs, and its transformer as a single file."""
    room = tmp_path_factory.mktemp("flux")
    configs = without_weights(tiny_folder("Flux"), room / "configs", ["transformer"])
    return configs, save_single("Flux", tiny_folder("Flux"), room / "good.safetensors")


def raw(name: str, content: bytes) -> Callable[[Path, Path], Path]:
    def make(folder: Path, good: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def safetensors(tensors: dict[str, torch.Tensor]) -> Callable[[Path, Path], Path]:
    def make(folder: Path, good: Path) -> Path:
        save_file(tensors, folder / NAME)
        return folder / NAME

    return make


def shapes(*names: str, side: int = 32) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(side, side) for name in names}


def truncated(folder: Path, good: Path) -> Path:
    (folder / NAME).write_bytes(good.read_bytes()[:-100])
    return folder / NAME


def truncated_gguf(folder: Path, good: Path) -> Path:
    path = save_gguf(load_file(good), folder / "model.gguf", "Q8_0")
    path.write_bytes(path.read_bytes()[:-5000])
    return path


def stored_as(dtype: torch.dtype) -> Callable[[Path, Path], Path]:
    def make(folder: Path, good: Path) -> Path:
        save_file(
            {name: tensor.to(dtype) for name, tensor in load_file(good).items()}, folder / NAME
        )
        return folder / NAME

    return make


def without(word: str) -> Callable[[Path, Path], Path]:
    def make(folder: Path, good: Path) -> Path:
        held = {name: t for name, t in load_file(good).items() if word not in name}
        save_file(held, folder / NAME)
        return folder / NAME

    return make


def wider(folder: Path, good: Path) -> Path:
    tensors = load_file(good)
    tensors["context_embedder.weight"] = torch.zeros(64, 48)
    save_file(tensors, folder / NAME)
    return folder / NAME


def scaled(folder: Path, good: Path) -> Path:
    """Scaled fp8 in ComfyUI's format."""
    tensors = {name: t.to(torch.float8_e4m3fn) for name, t in load_file(good).items()}
    tensors["context_embedder.scale_weight"] = torch.ones(1)
    save_file(tensors, folder / NAME)
    return folder / NAME


def pickled(name: str) -> Callable[[Path, Path], Path]:
    def make(folder: Path, good: Path) -> Path:
        torch.save({"state_dict": load_file(good)}, folder / name)
        return folder / name

    return make


def language_model(folder: Path, good: Path) -> Path:
    tensors = shapes("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_up.weight")
    return save_gguf(tensors, folder / "model.gguf", "Q8_0", "llama")


def other_gguf(folder: Path, good: Path) -> Path:
    tensors = shapes("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.linear.weight")
    return save_gguf(tensors, folder / "model.gguf", "Q8_0", "unknown")


def unread_gguf(folder: Path, good: Path) -> Path:
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    packed = np.zeros((32, 66), dtype=np.uint8)
    kind = gguf.GGMLQuantizationType.IQ2_XXS
    writer.add_tensor("img_in.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LORA = shapes("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight")
PEFT = shapes("transformer.transformer_blocks.0.attn.to_q.lora_A.weight")
CONTROLNET = shapes("control_model.input_hint_block.0.weight", "control_model.time_embed.0.weight")
DIFFUSERS_CONTROLNET = shapes("controlnet_cond_embedding.conv_in.weight", "conv_in.weight")
T5 = shapes("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight")
QWEN = shapes("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight")
WAN = {
    "head.modulation": torch.zeros(1, 2, 8),
    "patch_embedding.weight": torch.zeros(1536, 16, 1, 2, 2),
    "blocks.0.self_attn.q.weight": torch.zeros(8, 8),
}
LTX = shapes("model.diffusion_model.patchify_proj.weight", "model.diffusion_model.proj_out.weight")
HUNYUAN = shapes("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias")
ANIMATEDIFF = {
    "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0"
    ".attention_blocks.0.pos_encoder.pe": torch.zeros(1, 24, 8),
    "up_blocks.2.motion_modules.0.temporal_transformer.norm.weight": torch.zeros(8),
}
SVDQUANT = {"transformer_blocks.0.attn.to_q.qweight": torch.zeros(8, 8, dtype=torch.int8)}
SVDQUANT["img_in.weight"] = torch.zeros(8, 8)
EMBEDDING = {"emb_params": torch.zeros(2, 8)}

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 7\n"
FILES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "truncated": (truncated, "is truncated or corrupt .*; download it again"),
    "truncated GGUF": (truncated_gguf, "is truncated or corrupt .*; download it again"),
    "empty": (raw(NAME, b""), "is empty; download it again"),
    "empty GGUF": (raw("m.gguf", b""), "is empty; download it again"),
    "web page": (raw(NAME, b"<!DOCTYPE html>\n<html><body>404"), "is a web page, not weights"),
    "web page GGUF": (raw("m.gguf", b"\n <html lang=en>"), "is a web page, not weights"),
    "JSON error": (raw(NAME, b'{"error": "Invalid username"}'), "is JSON, not weights"),
    "LFS pointer": (raw(NAME, LFS), "only a Git LFS pointer.*run `git lfs pull`"),
    "random bytes": (raw(NAME, bytes(range(1, 200))), "is truncated or corrupt"),
    "GGUF by another name": (
        raw(NAME, b"GGUF\x03\0\0\0"),
        "is actually a GGUF file; rename it",
    ),
    "no GGUF": (
        raw("m.gguf", b"\x08\0\0\0\0\0\0\0{}      "),
        "isn't a GGUF file; if it's safetensors, rename",
    ),
    "ckpt": (pickled("m.ckpt"), "is a pickle.*convert it to safetensors.*save_file"),
    "bin": (pickled("m.bin"), "is a pickle.*convert it to safetensors.*save_file"),
    "pt": (pickled("m.pt"), "is a pickle.*convert it to safetensors.*save_file"),
    "pth": (pickled("m.pth"), "is a pickle.*convert it to safetensors.*save_file"),
    "pickle by another name": (pickled(NAME), "is a pickle"),
    "int8": (stored_as(torch.int8), "as int8, but weights must be floating point; use"),
    "int64": (stored_as(torch.int64), "as int64, but weights must be floating point; use"),
    "scaled fp8": (scaled, "quantized in a format that diffusers can't read.*use a GGUF"),
    "SVDQuant": (safetensors(SVDQUANT), "quantized with SVDQuant.*needs the package kernels"),
    "LoRA": (safetensors(LORA), "is a LoRA, not a model.*fuse_lora"),
    "PEFT's LoRA": (safetensors(PEFT), "is a LoRA, not a model.*fuse_lora"),
    "ControlNet": (safetensors(CONTROLNET), "is a ControlNet, not a model; set path to"),
    "diffusers' ControlNet": (safetensors(DIFFUSERS_CONTROLNET), "is a ControlNet"),
    "embedding": (safetensors(EMBEDDING), "is an embedding or adapter, not a model"),
    "T5": (safetensors(T5), r"is only a text encoder; set components = \{ text_encoder"),
    "Qwen": (safetensors(QWEN), "is only a text encoder; set components"),
    "Wan": (safetensors(WAN), r"is a video model \(wan-t2v-1.3B\).*set path to an image model"),
    "LTX": (safetensors(LTX), r"is a video model \(ltx-video\)"),
    "HunyuanVideo": (safetensors(HUNYUAN), r"is a video model \(hunyuan-video\)"),
    "AnimateDiff": (safetensors(ANIMATEDIFF), r"is a video model \(animatediff_v1\)"),
    "language model": (language_model, r"is the GGUF of a language model \(architecture 'llama'\)"),
    "GGUF of another model": (other_gguf, "isn't the FluxTransformer2DModel"),
    "GGUF of an unknown kind": (unread_gguf, "is quantized as IQ2_XXS, .*use a file with one of"),
    "part of a model": (without("proj_out"), "isn't the FluxTransformer2DModel"),
    "other shapes": (wider, r"context_embedder.weight has shape \[64, 48\], expected"),
    "missing": (lambda folder, good: folder / NAME, "the file .* is missing|no folder or file"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file_is_refused_in_one_sentence_before_loading(flux, tmp_path, monkeypatch, case):
    configs, good = flux
    make, reason = FILES[case]
    path = make(tmp_path, good)
    monkeypatch.setattr(
        "pipelines.loading.components.load_state_dict", lambda *_: pytest.fail("loaded")
    )
    model = entry(path, config=str(configs))
    for load in (lambda: load_pipeline(model, "cpu"), lambda: read_card(model)):
        with pytest.raises(ModelUnavailable, match=f"(?s)^model 'tiny': .*({reason})") as caught:
            load()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_models_own_vae_and_text_encoder_are_refused(flux, tiny_pipe, tmp_path):
    configs, _ = flux
    pipe = tiny_pipe("Flux")
    for tensors, reason in (
        (vae(pipe.vae), "is only a VAE; set components"),
        (pipe.vae.state_dict(), "is only a VAE; set components"),
        (clip(pipe.text_encoder), "is only a text encoder"),
        (pipe.text_encoder_2.state_dict(), "is only a text encoder"),
    ):
        save_file({k: t.clone().contiguous() for k, t in tensors.items()}, tmp_path / NAME)
        with pytest.raises(ModelUnavailable, match=reason):
            load_pipeline(entry(tmp_path / NAME, config=str(configs)), "cpu")


def test_a_file_of_another_family_names_the_config(flux, tiny_folder, tmp_path):
    configs, _ = flux
    path = save_single("ZImage", tiny_folder("ZImage"), tmp_path / NAME)
    with pytest.raises(ModelUnavailable, match=f"isn't the FluxTransformer2DModel.*{configs}"):
        load_pipeline(entry(path, config=str(configs)), "cpu")


@pytest.mark.parametrize(
    ("components", "reason"),
    [
        ({"vae": "lora"}, "isn't the AutoencoderKL"),
        ({"vae": "/nowhere"}, "components.vae: no file or folder at /nowhere"),
        ({"vae": "/nowhere.safetensors"}, "the file /nowhere.safetensors is missing"),
        ({"vae": "pickle"}, "is a pickle"),
        ({"text_encoder": "lora"}, "isn't the CLIPTextModel.*it's missing"),
        ({"text_encoder_2": "gguf"}, "is a GGUF, but text encoders can't be loaded from one"),
        ({"transformer": None}, "components: transformer can't be left out"),
    ],
)
def test_a_wrong_component_is_refused_in_one_sentence(flux, tmp_path, components, reason):
    configs, good = flux
    places = {
        "lora": safetensors(LORA)(tmp_path, good),
        "pickle": pickled("vae.pt")(tmp_path, good),
        "gguf": language_model(tmp_path, good),
    }
    chosen_places = {
        name: place and str(places.get(place, place)) for name, place in components.items()
    }
    model = entry(good, config=str(configs), components=chosen_places)
    with pytest.raises((ModelUnavailable, ConfigurationError), match=reason) as caught:
        load_pipeline(model, "cpu")
    assert "\n" not in str(caught.value)


def test_a_file_without_configs_names_the_field(flux, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    _, good = flux
    with pytest.raises(ModelUnavailable, match=r"diffusers doesn't recognize the model.*config = "):
        find_checkpoint(entry(good))
    qwen = save_single("QwenImage", tiny_folder("QwenImage"), tmp_path / "qwen.safetensors")
    with pytest.raises(ModelUnavailable, match=r"those of Qwen/Qwen-Image, .*config = "):
        find_checkpoint(entry(qwen))
    with pytest.raises(ModelUnavailable, match="'mine/configs' isn't in the local cache"):
        find_checkpoint(entry(qwen, config="mine/configs"))
    with pytest.raises(ModelUnavailable, match=r"'mine/it/a\.gguf' isn't in the local cache"):
        find_checkpoint(entry("mine/it/a.gguf", local=False))


# Folders.


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    return without_weights(tiny_folder("Flux"), tmp_path / "model", [])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "pip install bitsandbytes"),
        ({"quant_method": "modelopt", "quant_type": "NVFP4"}, "pip install nvidia-modelopt"),
        ({"quant_method": "nunchaku_lite", "svdq_w4a4": {}}, "pip install kernels"),
        ({"quant_method": "quanto"}, "pip install optimum-quanto"),
    ],
)
def test_a_quantized_folder_names_the_package_that_reads_it(folder, monkeypatch, config, reason):
    monkeypatch.setattr("pipelines.loading.quantization.find_spec", lambda name: None)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    for placement in ("replica", "split"):
        with pytest.raises(ConfigurationError, match=f"'tiny': .*{reason}"):
            load_pipeline(replace(entry(folder), placement=placement), "cpu")


def test_a_safetensors_file_is_never_mistaken_for_text_or_a_pickle(tmp_path):
    """Its first byte is part of the header's length, and may equal any letter."""
    for length in range(64, 1000):
        document = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
        content = length.to_bytes(8, "little") + document.encode().ljust(length) + bytes(4)
        (tmp_path / NAME).write_bytes(content)
        assert list(headers.read_header(tmp_path / NAME).tensors) == ["x"]
