"""Tiny pipelines as single files: with each family's original names, and as GGUF.

The inverse of diffusers' conversions, for the layers of the tiny models, so that a file is like its
family's published one, only smaller.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from diffusers import DiffusionPipeline
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet(module: Any) -> Tensors:
    """A UNet with the names of CompVis' latent diffusion."""
    each = module.config.layers_per_block + 1
    places = dict(_UNET)
    for side, block in (("down", "input"), ("up", "output")):
        first = 1 if side == "down" else 0
        for index, layer in enumerate(getattr(module, f"{side}_blocks")):
            for at, _ in enumerate(layer.resnets):
                place = f"{block}_blocks.{first + index * each + at}"
                places[f"{side}_blocks.{index}.resnets.{at}"] = f"{place}.0"
                places[f"{side}_blocks.{index}.attentions.{at}"] = f"{place}.1"
            if side == "down":
                places[f"down_blocks.{index}.downsamplers.0.conv"] = (
                    f"input_blocks.{(index + 1) * each}.0.op"
                )
            else:
                at = 2 if hasattr(layer, "attentions") else 1
                places[f"up_blocks.{index}.upsamplers.0.conv"] = (
                    f"output_blocks.{(index + 1) * each - 1}.{at}.conv"
                )
    places |= {f"mid_block.resnets.{at}": f"middle_block.{2 * at}" for at in (0, 1)}
    places["mid_block.attentions.0"] = "middle_block.1"
    renamed = _placed(module.state_dict(), places)
    return {
        _replaced(name, _RESNET) if _is_resnet(name) else name: tensor
        for name, tensor in renamed.items()
    }


def _is_resnet(name: str) -> bool:
    return any(f".{part}." in name for part in _RESNET) and "transformer_blocks" not in name


def vae(module: Any) -> Tensors:
    """An AutoencoderKL with the names of CompVis' latent diffusion."""
    count = len(module.config.block_out_channels)
    places = {}
    for index in range(count):
        for side, at in (("encoder.down", index), ("decoder.up", count - 1 - index)):
            room, kind = side.split(".")
            places[f"{room}.{kind}_blocks.{index}.resnets"] = f"{side}.{at}.block"
            sampler = "downsample" if kind == "down" else "upsample"
            places[f"{room}.{kind}_blocks.{index}.{sampler}rs.0"] = f"{side}.{at}.{sampler}"
    for room in ("encoder", "decoder"):
        places |= {f"{room}.mid_block.resnets.{n}": f"{room}.mid.block_{n + 1}" for n in (0, 1)}
        places[f"{room}.mid_block.attentions.0"] = f"{room}.mid.attn_1"
        places[f"{room}.conv_norm_out"] = f"{room}.norm_out"
    renamed = {}
    for name, tensor in _placed(module.state_dict(), places).items():
        if ".attn_1." in name:
            words = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}
            name = _replaced(name, words | {"to_out.0": "proj_out"})
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        renamed[name.replace("conv_shortcut", "nin_shortcut")] = tensor
    return renamed


def clip(module: Any) -> Tensors:
    """A CLIP text model with the names of OpenAI's checkpoints."""
    return {
        name if name.startswith("text_") else f"text_model.{name}": tensor
        for name, tensor in module.state_dict().items()
    }


def open_clip(module: Any) -> Tensors:
    """A CLIP text model with projection, with OpenCLIP's names."""
    tensors = {name.removeprefix("text_model."): t for name, t in module.state_dict().items()}
    places = {
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "final_layer_norm": "ln_final",
        "encoder.layers": "transformer.resblocks",
    }
    renamed = {"text_projection": tensors.pop("text_projection.weight").T.contiguous()}
    for name, tensor in _placed(tensors, places).items():
        name = _replaced(name, {"layer_norm1": "ln_1", "layer_norm2": "ln_2"})
        name = _replaced(name, {"fc1": "c_fc", "fc2": "c_proj", "self_attn": "attn"})
        renamed[name] = tensor
    return _fused(renamed, ("q_proj", "k_proj", "v_proj"), "in_proj", joint="_")


def sd3(module: Any) -> Tensors:
    """Stable Diffusion 3's transformer with Stability's names."""
    places = {
        "pos_embed.proj": "x_embedder.proj",
        "pos_embed.pos_embed": "pos_embed",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    }
    words = {
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn.to_": "x_block.attn.to_",
        "attn.add_": "context_block.attn.add_",
    }
    last = f"joint_blocks.{module.config.num_layers - 1}.context_block.adaLN_modulation.1"
    renamed = {}
    for name, tensor in _placed(module.state_dict(), places).items():
        name = name.replace("transformer_blocks", "joint_blocks")
        word = next((w for w in words if f".{w}" in name and "joint_blocks" in name), None)
        name = name if word is None else name.replace(word, words[word], 1)
        is_last = name.startswith((last, "final_layer.adaLN_modulation"))
        renamed[name] = _swapped(tensor) if is_last else tensor
    renamed = _fused(renamed, ("to_q", "to_k", "to_v"), "qkv")
    return _fused(renamed, ("add_q_proj", "add_k_proj", "add_v_proj"), "qkv")


def flux2(module: Any) -> Tensors:
    """FLUX.2's transformer with Black Forest Labs' names."""
    places = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
    }
    double = {
        "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
        "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
        "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
        "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
        "ff_context.linear_in": "txt_mlp.0",
        "ff_context.linear_out": "txt_mlp.2",
        "attn.to_": "img_attn.to_",
        "attn.add_": "txt_attn.add_",
    }
    single = {
        "attn.to_qkv_mlp_proj": "linear1",
        "attn.to_out": "linear2",
        "attn.norm_q.weight": "norm.query_norm.scale",
        "attn.norm_k.weight": "norm.key_norm.scale",
    }
    renamed = {}
    for name, tensor in _placed(module.state_dict(), places).items():
        is_single = name.startswith("single_transformer_blocks")
        words = single if is_single else double if name.startswith("transformer_blocks") else {}
        word = next((w for w in words if f".{w}" in name), None)
        name = name if word is None else name.replace(word, words[word], 1)
        name = name.replace("single_transformer_blocks", "single_blocks")
        name = name.replace("transformer_blocks", "double_blocks")
        is_swapped = name.startswith("final_layer.adaLN_modulation")
        renamed[name] = _swapped(tensor) if is_swapped else tensor
    renamed = _fused(renamed, ("to_q", "to_k", "to_v"), "qkv")
    return _fused(renamed, ("add_q_proj", "add_k_proj", "add_v_proj"), "qkv")


def z_image(module: Any) -> Tensors:
    """Z-Image's transformer with Tongyi's names."""
    places = {"all_final_layer.2-1": "final_layer", "all_x_embedder.2-1": "x_embedder"}
    words = {".attention.to_out.0.": ".attention.out.", "norm_k": "k_norm", "norm_q": "q_norm"}
    renamed = {
        _replaced(name, words) if ".attention." in name else name: tensor
        for name, tensor in _placed(module.state_dict(), places).items()
    }
    return _fused(renamed, ("to_q", "to_k", "to_v"), "qkv")


def plain(module: Any) -> Tensors:
    """diffusers' own names, as in Qwen-Image's files."""
    return dict(module.state_dict())


def prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


DENOISER = "model.diffusion_model."


def checkpoint_of(name: str, pipe: Any) -> Tensors:
    """All tensors in the family's usual single file."""
    if name in ("SD15", "SDXL"):
        tensors = prefixed(DENOISER, unet(pipe.unet))
        tensors |= prefixed("first_stage_model.", vae(pipe.vae))
        if name == "SD15":
            return tensors | prefixed("cond_stage_model.transformer.", clip(pipe.text_encoder))
        tensors |= prefixed("conditioner.embedders.0.transformer.", clip(pipe.text_encoder))
        return tensors | prefixed("conditioner.embedders.1.model.", open_clip(pipe.text_encoder_2))
    if name == "SD3":
        tensors = prefixed(DENOISER, sd3(pipe.transformer))
        tensors |= prefixed("first_stage_model.", vae(pipe.vae))
        t5 = pipe.text_encoder_3.state_dict()
        return tensors | prefixed("text_encoders.t5xxl.transformer.", t5)
    makers = {"Flux2Klein": flux2, "ZImage": z_image}
    return makers.get(name, plain)(pipe.transformer)


def save_single(name: str, folder: Path, target: Path) -> Path:
    """Save the tiny pipeline in `folder` as one safetensors file."""
    tensors = checkpoint_of(name, DiffusionPipeline.from_pretrained(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, target)
    return target


def without_weights(folder: Path, target: Path, names: Iterable[str]) -> Path:
    """Copy a diffusers folder with only the configs of these components."""
    shutil.copytree(folder, target)
    for name in names:
        for path in (target / name).glob("*.safetensors*"):
            path.unlink()
    return target


def save_gguf(
    tensors: Tensors,
    target: Path,
    kind: str,
    architecture: str = "flux",
    *,
    everything: bool = False,
) -> Path:
    """Save a GGUF with linear layers' weights in this format, if their rows are long enough.

    With `everything`, biases and norms are quantized too.
    """
    quantized = gguf.GGMLQuantizationType[kind]
    block = gguf.GGML_QUANT_SIZES[quantized][0]
    target.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(target, architecture)
    for name, tensor in tensors.items():
        data = tensor.float().numpy()
        if (everything or tensor.dim() == 2) and tensor.shape[-1] % block == 0:
            packed = gguf.quants.quantize(data, quantized)
            writer.add_tensor(name, packed, raw_dtype=quantized)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def dequantized(path: Path) -> Tensors:
    """A GGUF's tensors dequantized to floating point, as diffusers computes with them."""
    dense = {}
    for entry in gguf.GGUFReader(path).tensors:
        data = torch.from_numpy(entry.data.copy())
        kind = entry.tensor_type
        if kind not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            data = dequantize_gguf_tensor(GGUFParameter(data, quant_type=kind))
        dense[entry.name] = data.float()
    return dense


def _placed(tensors: Mapping[str, torch.Tensor], places: Mapping[str, str]) -> Tensors:
    """Rename tensors by their longest known prefix."""
    renamed = {}
    for name, tensor in tensors.items():
        at = max((p for p in places if name == p or name.startswith(f"{p}.")), key=len, default="")
        renamed[f"{places[at]}{name.removeprefix(at)}" if at else name] = tensor
    return renamed


def _replaced(name: str, words: Mapping[str, str]) -> str:
    for word, other in words.items():
        name = name.replace(word, other)
    return name


def _swapped(tensor: torch.Tensor) -> torch.Tensor:
    first, second = tensor.chunk(2, dim=0)
    return torch.cat([second, first])


def _fused(tensors: Tensors, names: tuple[str, ...], fused: str, joint: str = ".") -> Tensors:
    """Fuse three projections into one, as in the original files."""
    renamed = {}
    for name, tensor in tensors.items():
        word = next((word for word in names if f".{word}." in name), None)
        if word is None:
            renamed[name] = tensor
        elif word == names[0]:
            three = [tensors[name.replace(f".{word}.", f".{part}.")] for part in names]
            renamed[name.replace(f".{word}.", f".{fused}{joint}")] = torch.cat(three)
    return renamed
