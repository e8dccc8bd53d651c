"""Tell what's in a single weight file from the names of its tensors.

A file may have a denoiser alone or with its VAE and text encoders, under the original names or
diffusers' own. Files that are often mistaken for an image model (a LoRA, a ControlNet, a video
model) are recognized, so that the error can say what to do with them. Only headers are read.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    CHECKPOINT_KEY_NAMES,
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    infer_diffusers_model_type,
)

from jobs.errors import ModelUnavailable
from pipelines.loading.headers import Header

DENOISER_PREFIX = "model.diffusion_model."
VAE_PREFIXES = ("first_stage_model.", "vae.")
TEXT_PREFIXES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "CLIP": {
        "text_encoder": (
            "cond_stage_model.",
            "conditioner.embedders.0.",
            "text_encoders.clip_l.",
        ),
        "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    },
    "T5": dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3"), ("text_encoders.t5xxl.",)
    ),
}
"""Text encoder class -> component -> prefixes of its tensors in a whole checkpoint."""

QWEN_IMAGE = "Qwen/Qwen-Image"
"""Configs of the one family whose single files diffusers doesn't recognize."""

_VIDEO = ("ltx", "wan", "hunyuan-video", "mochi", "animatediff", "cosmos-1.0", "minimax")
_ADD_ONS = ("animatediff", "controlnet")
_LORA = ("lora_down", "lora_up", ".lora_A.", ".lora_B.", "lora_unet_", "lora_te", "lokr_", "hada_")
_CONTROLNET = (
    "control_model.",
    "controlnet_cond_embedding.",
    "controlnet_blocks.",
    "controlnet_down_blocks.",
    "controlnet_x_embedder.",
    "zero_convs.",
    "input_hint_block.",
    "control_layers.",
    "control_all_x_embedder.",
)
_ADAPTER = ("ip_adapter.", "image_proj.", "emb_params", "string_to_param", "clip_l", "clip_g")
_TEXT = (
    "text_model.encoder.",
    "encoder.block.0.layer.",
    "encoder.layers.0.",
    "shared.weight",
    "model.layers.0.",
    "model.language_model.",
    "language_model.",
    "model.embed_tokens.",
    "embed_tokens.",
    "token_embd.",
    "blk.0.",
    "enc.blk.0.",
)
_VAE = (
    "encoder.down.0.",
    "encoder.down_blocks.",
    "decoder.up.0.",
    "decoder.up_blocks.",
    "encoder.downsamples.",
    "decoder.upsamples.",
    "decoder.conv_in.",
    "decoder.stages.",
)


def refuse_others(header: Header) -> None:
    """Raise ModelUnavailable for a file that's known not to be an image model."""
    names, path = header.tensors.keys(), header.path
    if _any(names, _LORA):
        raise ModelUnavailable(
            f"{path} is a LoRA, not a model; merge it into its base model with diffusers' "
            "fuse_lora() and save_pretrained(), and set path to that folder"
        )
    if any(name.startswith(_CONTROLNET) for name in names):
        raise ModelUnavailable(f"{path} is a ControlNet, not a model; set path to the model")
    if header.is_gguf and any(name.startswith(("blk.0.", "token_embd.", "enc.")) for name in names):
        kind = header.metadata.get("general.architecture", "unknown")
        raise ModelUnavailable(
            f"{path} is the GGUF of a language model (architecture {kind!r}), not of an image "
            "model; set path to the denoiser's file"
        )
    if holds_denoiser(names):
        _refuse_video(header)
        return
    if len(names) < 10 and any(name.startswith(_ADAPTER) for name in names):
        raise ModelUnavailable(
            f"{path} is an embedding or adapter, not a model; set path to the model"
        )
    if any(name.startswith(_VAE) for name in names):
        raise ModelUnavailable(
            f'{path} is only a VAE; set components = {{ vae = "..." }} to it, and path to the '
            "denoiser"
        )
    if any(name.startswith(_TEXT) for name in names):
        raise ModelUnavailable(
            f'{path} is only a text encoder; set components = {{ text_encoder = "..." }} to it, '
            "and path to the denoiser"
        )


def holds_denoiser(names: Iterable[str]) -> bool:
    """Whether the file may have a denoiser, because some tensors belong to no other component."""
    all_names = list(names)
    if any(name.startswith(DENOISER_PREFIX) for name in all_names):
        return True
    others = (*VAE_PREFIXES, *_text_prefixes())
    rest = [name for name in all_names if not name.startswith(others)]
    return bool(rest) and not any(name.startswith((*_VAE, *_TEXT, *_ADAPTER)) for name in rest)


def _refuse_video(header: Header) -> None:
    kind = _kind_of(header)
    if kind is not None and kind.startswith(_VIDEO):
        raise ModelUnavailable(
            f"{header.path} is a video model ({kind}), which doesn't generate images; set path to "
            "an image model"
        )
    if kind is not None and kind.startswith(_ADD_ONS):
        raise ModelUnavailable(
            f"{header.path} is an add-on ({kind}), not a model; set path to the model"
        )


def default_config(header: Header) -> str:
    """The hub id whose configs diffusers would use for the file. Raises ModelUnavailable."""
    names = header.tensors.keys()
    if any(name.removeprefix(DENOISER_PREFIX) == "txt_norm.weight" for name in names):
        return QWEN_IMAGE
    kind = _kind_of(header)
    if kind is None:
        raise ModelUnavailable(
            f"diffusers doesn't recognize the model in {header.path}; if it's an image model, set "
            'config = "..." to a diffusers folder or hub id with its configs'
        )
    default: str = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    return default


def _kind_of(header: Header) -> str | None:
    """diffusers' name for the kind of model; None if it would only be guessing."""
    tensors: Any = dict(header.tensors)
    if any(name.startswith("input_blocks.") for name in tensors):  # a file with only a UNet
        tensors = {f"{DENOISER_PREFIX}{name}": tensor for name, tensor in tensors.items()}
    try:
        kind: str = infer_diffusers_model_type(tensors)
    except Exception:  # it looks up tensors that files of other kinds lack
        return None
    is_sd = CHECKPOINT_KEY_NAMES["inpainting"] in tensors
    return kind if kind != "v1" or is_sd else None


def of_component(
    tensors: Mapping[str, torch.Tensor], name: str, class_name: str
) -> dict[str, torch.Tensor]:
    """One component's tensors in a whole checkpoint, named as diffusers' converters expect.

    Empty if the file doesn't have the component. The denoiser's prefix is removed, except for a
    UNet, because its converter looks for the prefix.
    """
    if name == "vae":
        prefixes: tuple[str, ...] = VAE_PREFIXES
    elif name.startswith("text_encoder"):
        family = next((key for key in TEXT_PREFIXES if class_name.startswith(key)), None)
        prefixes = TEXT_PREFIXES[family].get(name, ()) if family else ()
    else:
        return _denoiser(tensors, class_name)
    return {key: tensor for key, tensor in tensors.items() if key.startswith(prefixes)}


def _denoiser(tensors: Mapping[str, torch.Tensor], class_name: str) -> dict[str, torch.Tensor]:
    own = {key: tensor for key, tensor in tensors.items() if key.startswith(DENOISER_PREFIX)}
    if not own:
        others = (*VAE_PREFIXES, *_text_prefixes())
        own = {
            f"{DENOISER_PREFIX}{key}": tensor
            for key, tensor in tensors.items()
            if not key.startswith(others)
        }
    is_original_unet = class_name.startswith("UNet") and any("input_blocks." in k for k in own)
    if is_original_unet:
        return own
    return {key.removeprefix(DENOISER_PREFIX): tensor for key, tensor in own.items()}


def _text_prefixes() -> tuple[str, ...]:
    groups = (group for family in TEXT_PREFIXES.values() for group in family.values())
    return tuple({prefix for group in groups for prefix in group})


def _any(names: Iterable[str], words: Iterable[str]) -> bool:
    return any(word in name for name in names for word in words)
