"""A checkpoint without its weights: its models on the meta device, and their sizes as plan parts.

Reads configs only, so a folder without any weights will do, and a model of any size takes no
memory. What activations take is a formula in the model's width and the image's size, with
constants that were counted: `ALIVE` and `PER_PIXEL` say how. Places nothing.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from typing import Any

import torch
from torch import nn

from jobs.catalog import Model
from jobs.errors import ModelUnavailable
from pipelines.loading.checkpoint import Checkpoint
from pipelines.loading.components import DENOISERS, component_class
from pipelines.loading.quantization import tensor_bytes
from pipelines.planner.memory import Part

ENCODE, DENOISE, DECODE = "encode", "denoise", "decode"
STAGES = (ENCODE, DENOISE, DECODE)

ALIVE = 24
"""Values alive at once for each token and channel of a transformer at its widest point.

Counted by running real configurations on the meta device with fused attention: FLUX.1 17.6,
FLUX.2 21.6, Qwen-Image 15.0, SD3 12.9, Sana 11.3, T5-XXL 23.0."""

ALIVE_UNET = 27
"""The same for each latent pixel and channel of a UNet's first block: SD1.5 26.1, SDXL 15.9."""

PER_PIXEL = {"AutoencoderKL": 3.1, "AutoencoderKLFlux2": 3.1, "AutoencoderDC": 6.6}
"""Values alive at once for each pixel and channel while decoding; of the second block's channels,
for AutoencoderDC of the first's. Counted like `ALIVE`: 3.00 and 6.51."""

PER_PIXEL_OTHERS = 1800
"""Values for each pixel in any other autoencoder; Qwen-Image's takes 1730."""

PER_PIXEL_RGB = 16
"""Values for each pixel of the picture itself, on its way out of any autoencoder."""

TEXT_TOKENS = 512
"""Tokens of a prompt where the entry does not say."""


def stage_of(name: str) -> str:
    """The stage that a component takes part in."""
    if name in DENOISERS:
        return DENOISE
    return DECODE if name in ("vae", "safety_checker", "vqvae", "movq") else ENCODE


def skeletons(model: Model, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """Every component that has weights, by name, on the meta device in the dtype it loads in.

    Raises ModelUnavailable.
    """
    made = {}
    for name, (library, class_name) in _listed(checkpoint):
        kind = component_class(library, class_name)
        if not isinstance(kind, type) or not issubclass(kind, nn.Module):
            continue
        try:
            with torch.device("meta"):
                module = _from_config(kind, checkpoint, name)
        except Exception as error:  # any library's; the config is at fault or too new
            raise ModelUnavailable(
                f"model {model.name!r}: {checkpoint.source(name).config} cannot be read: "
                f"{(str(error) or type(error).__name__).splitlines()[0]}"
            ) from error
        made[name] = _cast(module, getattr(torch, model.dtype)).eval()
    return made


def parts(
    modules: Mapping[str, nn.Module], checkpoint: Checkpoint, model: Model
) -> dict[str, list[Part]]:
    """The modules as plan parts, by stage, with activations for one image of the default size."""
    image = Image(modules, checkpoint, model)
    found: dict[str, list[Part]] = {stage: [] for stage in STAGES}
    for name, module in modules.items():
        blocks, rest = blocks_of(module, tensor_bytes(model, checkpoint, name, module))
        stage = stage_of(name)
        part = Part(name, blocks, rest, image.activations(name, module), stage != DECODE)
        found[stage].append(part)
    return found


def blocks_of(
    module: nn.Module, sizes: Mapping[str, int] | None = None
) -> tuple[dict[str, int], int]:
    """Bytes of each block that a model may be cut between, in order; and of all the rest.

    `sizes` are bytes by tensor's name where the weights are quantized, else the module's own count.

    Blocks are the items of the outermost lists of modules. They hand tensors to each other through
    the model's own forward; inside one of them residuals meet, and a cut there would add tensors
    of two devices.
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
    """Bytes of each tensor that is not `seen`; tied weights count once."""
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor.numel() * tensor.element_size()


class Image:
    """One image of a model's default size: how many tokens it is, and what they take."""

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
        """Bytes that a component takes beside its weights for this image."""
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
        # Templates and instructions lengthen a short limit.
        tokens = max(self.text, TEXT_TOKENS)
        return int(tokens * (width_of(config) * ALIVE + _logits(module)) * item)


def vae_scale(config: Mapping[str, Any]) -> int:
    """Pixels of a latent pixel's side, from an autoencoder's config."""
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    levels = levels or config.get("dim_mult") or range(4)
    return int(2 ** (len(levels) - 1))


def width_of(config: Any) -> int:
    """Channels of a transformer's tokens."""
    text = getattr(config, "text_config", None)
    if text is not None:
        return width_of(text)
    for name in ("hidden_size", "d_model", "dim"):
        found = _get(config, name)
        if found:
            return int(found)
    heads, head = _get(config, "num_attention_heads"), _get(config, "attention_head_dim")
    return int(heads * head) if isinstance(heads, int) and isinstance(head, int) else 4096


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _patch(config: Any, vae_config: Any) -> int:
    """Latent pixels of a token's side: 2 where the pipeline packs latents 2x2 into channels."""
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
    """Words of a language model's head, which computes a score for each of them."""
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
        made: nn.Module = kind.from_config(kind.load_config(folder))
        return made
    config = kind.config_class.from_pretrained(folder)
    built: nn.Module = kind(config)
    return built


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In the dtype that `from_pretrained` gives each tensor; some stay in float32."""
    kept = _kept_in_float32(module, dtype)
    for path, inner in module.named_modules():
        for tensors in (inner._parameters, inner._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_floating_point():
                    continue
                keep = any(word in f"{path}.{name}".split(".") for word in kept)
                cast = tensor.to(torch.float32 if keep else dtype)
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
    """Tied weights again one tensor, as transformers loads them."""
    tie = getattr(module, "tie_weights", None)
    if tie is not None:
        tie()


def inner_module(module: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path; itself at ""."""
    found: nn.Module = reduce(getattr, filter(None, path.split(".")), module)
    return found
