"""Build a checkpoint's models on the meta device, without weights, and their sizes as plan parts.

Only configs are read, so a folder without weights is enough and a model of any size takes no
memory. The bytes of activations are a formula in the model's width and the image's size; see
`ALIVE` and `PER_PIXEL` for how its constants were counted. Nothing is placed here.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from typing import Any

import torch
from torch import nn

from jobs.catalog import Model
from jobs.errors import ModelUnavailable, first_line
from pipelines.loading.checkpoint import Checkpoint
from pipelines.loading.components import DENOISERS, component_class
from pipelines.loading.quantization import tensor_bytes
from pipelines.planner.memory import Part

ENCODE, DENOISE, DECODE = "encode", "denoise", "decode"
STAGES = (ENCODE, DENOISE, DECODE)

ALIVE = 24
"""Values alive at once, per token and channel, at a transformer's widest point.

Counted by running real configurations on the meta device with fused attention: FLUX.1 17.6,
FLUX.2 21.6, Qwen-Image 15.0, SD3 12.9, Sana 11.3, T5-XXL 23.0."""

ALIVE_UNET = 27
"""The same per latent pixel and channel of a UNet's first block: SD1.5 26.1, SDXL 15.9."""

PER_PIXEL = {"AutoencoderKL": 3.1, "AutoencoderKLFlux2": 3.1, "AutoencoderDC": 6.6}
"""Values alive at once while decoding, per pixel and channel of the second block (of the first for
AutoencoderDC). Counted like `ALIVE`: 3.00 and 6.51."""

PER_PIXEL_OTHERS = 1800
"""Values per pixel in any other autoencoder; Qwen-Image's takes 1730."""

PER_PIXEL_RGB = 16
"""Values per pixel of the picture itself, as it leaves any autoencoder."""

TEXT_TOKENS = 512
"""Tokens of a prompt if the entry doesn't set them."""


def stage_of(name: str) -> str:
    """The stage in which a component runs."""
    if name in DENOISERS:
        return DENOISE
    return DECODE if name in ("vae", "safety_checker", "vqvae", "movq") else ENCODE


def skeletons(model: Model, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """Every component that has weights, by name, on the meta device in the dtype it loads in.

    Raises ModelUnavailable.
    """
    modules = {}
    for name, (library, class_name) in _listed(checkpoint):
        kind = component_class(library, class_name)
        if not isinstance(kind, type) or not issubclass(kind, nn.Module):
            continue
        try:
            with torch.device("meta"):
                module = _from_config(kind, checkpoint, name)
        except Exception as error:  # from any library: the config is broken or too new
            raise ModelUnavailable(
                f"model {model.name!r}: can't read {checkpoint.source(name).config}: "
                f"{first_line(error)}"
            ) from error
        modules[name] = _cast(module, getattr(torch, model.dtype)).eval()
    return modules


def parts(
    modules: Mapping[str, nn.Module], checkpoint: Checkpoint, model: Model
) -> dict[str, list[Part]]:
    """The modules as plan parts, by stage, with activations for one image of the default size."""
    image = Image(modules, checkpoint, model)
    by_stage: dict[str, list[Part]] = {stage: [] for stage in STAGES}
    for name, module in modules.items():
        blocks, rest = blocks_of(module, tensor_bytes(model, checkpoint, name, module))
        stage = stage_of(name)
        part = Part(name, blocks, rest, image.activations(name, module), stage != DECODE)
        by_stage[stage].append(part)
    return by_stage


def blocks_of(
    module: nn.Module, sizes: Mapping[str, int] | None = None
) -> tuple[dict[str, int], int]:
    """Bytes of each block, in order, and of everything outside the blocks.

    A model may be cut between blocks. `sizes` is the bytes by tensor name for quantized weights; by
    default the module's own tensors are counted.

    Blocks are the items of the outermost ModuleLists. They pass tensors to each other through the
    model's own forward. A cut inside a block would add tensors of two devices, because a block's
    residuals meet there.
    """
    if sizes is not None:
        blocks = {
            name: sum(size for key, size in sizes.items() if key.startswith(f"{name}."))
            for name, _ in _items("", module)
        }
        return blocks, sum(sizes.values()) - sum(blocks.values())
    seen: set[int] = set()
    blocks = {name: sum(_sizes(item, seen)) for name, item in _items("", module)}
    return blocks, sum(_sizes(module, seen))


def _items(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    never_cut = getattr(module, "_no_split_modules", None) or ()
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if isinstance(child, nn.ModuleList):
            yield from ((f"{path}.{index}", item) for index, item in child.named_children())
        elif type(child).__name__ not in never_cut:
            yield from _items(path, child)


def _sizes(module: nn.Module, seen: set[int]) -> Iterator[int]:
    """Bytes of each tensor not in `seen`, so that tied weights count once."""
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor.numel() * tensor.element_size()


class Image:
    """One image of a model's default size: its tokens, and the memory they need."""

    def __init__(
        self, modules: Mapping[str, nn.Module], checkpoint: Checkpoint, model: Model
    ) -> None:
        self.pixels = model.defaults.width * model.defaults.height
        self.text = model.max_sequence_length or TEXT_TOKENS
        vae = modules.get("vae")
        self.scale = vae_scale(getattr(vae, "config", {}))
        denoiser = next((modules[name] for name in DENOISERS if name in modules), None)
        config = getattr(denoiser, "config", {})
        self.patch = self.scale * _patch(config, getattr(vae, "config", {}))
        self.tokens = self.pixels // self.patch**2
        embedded = config.get("guidance_embeds") or config.get("time_cond_proj_dim")
        unguided = embedded or checkpoint.index.get("is_distilled")
        self.rows = 1 if unguided or model.defaults.guidance_scale <= 1 else 2

    def activations(self, name: str, module: nn.Module) -> int:
        """Bytes that a component needs for this image, in addition to its weights."""
        config: Any = getattr(module, "config", {})
        item = torch.finfo(next(module.parameters()).dtype).bits // 8
        stage = stage_of(name)
        if stage == DECODE:
            alive = PER_PIXEL_RGB + _alive_per_pixel(type(module).__name__, config)
            return int(self.pixels * alive * item)
        if stage == DENOISE and "block_out_channels" in config:
            latent = self.pixels // self.scale**2
            channels = config["block_out_channels"][0]
            return int(self.rows * latent * channels * ALIVE_UNET * item)
        if stage == DENOISE:
            return int(self.rows * (self.tokens + self.text) * width_of(config) * ALIVE * item)
        # Templates and instructions add tokens to a short limit.
        tokens = max(self.text, TEXT_TOKENS)
        return int(tokens * (width_of(config) * ALIVE + _logits(module)) * item)


def vae_scale(config: Mapping[str, Any]) -> int:
    """Pixels per side of a latent pixel, from an autoencoder's config."""
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    levels = levels or config.get("dim_mult") or range(4)
    return int(2 ** (len(levels) - 1))


def width_of(config: Any) -> int:
    """Channels of a transformer's tokens."""
    text = getattr(config, "text_config", None)
    if text is not None:
        return width_of(text)
    for name in ("hidden_size", "d_model", "dim"):
        width = _get(config, name)
        if width:
            return int(width)
    heads, head_dim = _get(config, "num_attention_heads"), _get(config, "attention_head_dim")
    is_known = isinstance(heads, int) and isinstance(head_dim, int)
    return int(heads * head_dim) if is_known else 4096


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _patch(config: Any, vae_config: Any) -> int:
    """Latent pixels per side of a token: 2 if the pipeline packs latents 2x2 into channels."""
    latent = vae_config.get("latent_channels") or vae_config.get("z_dim")
    if latent and config.get("in_channels") == 4 * latent:
        return 2
    patches = config.get("all_patch_size") or [config.get("patch_size") or 1]
    return int(max(patches))


def _alive_per_pixel(class_name: str, config: Any) -> float:
    if class_name not in PER_PIXEL:
        return PER_PIXEL_OTHERS if "z_dim" in config else 0
    channels = config.get("block_out_channels") or config.get("decoder_block_out_channels")
    level = 0 if class_name == "AutoencoderDC" else min(1, len(channels) - 1)
    return float(PER_PIXEL[class_name] * channels[level])


def _logits(module: nn.Module) -> int:
    """The vocabulary size of a language model's head, which computes a score per word."""
    head = getattr(module, "lm_head", None)
    return int(head.weight.shape[0]) if head is not None else 0


def _listed(checkpoint: Checkpoint) -> Iterable[tuple[str, tuple[str, str]]]:
    for name in checkpoint.components:
        library, class_name = checkpoint.index[name]
        if library is not None:
            yield name, (library, class_name)


def _from_config(kind: Any, checkpoint: Checkpoint, name: str) -> nn.Module:
    folder = checkpoint.source(name).config
    if hasattr(kind, "load_config"):  # diffusers
        module: nn.Module = kind.from_config(kind.load_config(folder))
    else:
        module = kind(kind.config_class.from_pretrained(folder))
    return module


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast each tensor to the dtype that `from_pretrained` gives it; some stay in float32."""
    float32_names = _kept_in_float32(module, dtype)
    for path, inner in module.named_modules():
        for tensors in (inner._parameters, inner._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_floating_point():
                    continue
                is_float32 = any(word in f"{path}.{name}".split(".") for word in float32_names)
                cast = tensor.to(torch.float32 if is_float32 else dtype)
                tensors[name] = _like(tensor, cast)
    _tie(module)
    return module


def _kept_in_float32(module: nn.Module, dtype: torch.dtype) -> Iterable[str]:
    if hasattr(module, "load_config"):
        return getattr(module, "_keep_in_fp32_modules", None) or ()
    strict = getattr(module, "_keep_in_fp32_modules_strict", None) or ()
    loose = getattr(module, "_keep_in_fp32_modules", None) or ()
    return [*strict, *(loose if dtype == torch.float16 else ())]


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=False)
    return new


def _tie(module: nn.Module) -> None:
    """Tie weights again, as transformers does when it loads them."""
    tie = getattr(module, "tie_weights", None)
    if tie is not None:
        tie()


def inner_module(module: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path; the module itself for ""."""
    inner: nn.Module = reduce(getattr, filter(None, path.split(".")), module)
    return inner
