"""Quantized weights: quantized while loading, or already quantized in the checkpoint.

With `quantization` in an entry, torchao quantizes components while they load. A component may also
be stored quantized: a GGUF, a file with scales, or a folder whose config.json names the method.
For both, this module checks the required packages and devices and counts the bytes in memory, for
workers and for `imagemill plan`.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import structlog
import torch
from diffusers import TorchAoConfig
from diffusers.quantizers.gguf.utils import GGUFParameter
from torch import nn

from jobs.catalog import Model
from jobs.errors import ConfigurationError
from pipelines.loading.checkpoint import Checkpoint
from pipelines.loading.components import DENOISERS, SCALE, SCALES, Source, converted
from pipelines.loading.contents import of_component
from pipelines.loading.headers import read_header

FP8_CAPABILITY = (8, 9)
"""The lowest CUDA compute capability with fp8 arithmetic: Ada and Hopper."""

PACKAGES = {
    "torchao": ("torchao.quantization", "torchao"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "modelopt": ("modelopt", "nvidia-modelopt"),
    "nunchaku_lite": ("kernels", "kernels"),
    "svdquant": ("kernels", "kernels"),
    "sdnq": ("sdnq", "sdnq"),
    "auto-round": ("auto_round", "auto-round"),
    "fp8": ("kernels", "kernels"),
    "mxfp4": ("kernels", "kernels"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
}
"""`quant_method` in a config.json -> the module that reads it, and the package to install."""

NEEDS_GPU = ("bitsandbytes", "modelopt", "nunchaku_lite", "svdquant", "fp8", "mxfp4")
"""Methods whose libraries can't load anything without an accelerator."""

SCALE_BYTES = {"int8": 5, "fp8": 4}
"""Bytes per row of a quantized weight, in addition to one byte per value: a float32 scale, and for
int8 a zero point. Counted from torchao 0.18's tensors."""

_STORED_BYTES = {"bitsandbytes_4bit": 0.53, "nunchaku_lite": 0.58, "modelopt": 0.57}
"""Bytes per value of a linear layer's weight, for a folder of which only the configs are present.

That's half a byte, plus scales per 64 values (nf4) or per 16 (NVFP4, SVDQuant), plus SVDQuant's
low-rank part. Other methods take 1 byte."""

log = structlog.get_logger(__name__)


def schemes(model: Model, checkpoint: Checkpoint) -> dict[str, str]:
    """Component -> the quantization that the entry sets. Raises ConfigurationError."""
    if model.quantization is None:
        return {}
    if isinstance(model.quantization, str):
        name = next((name for name in DENOISERS if name in checkpoint.components), None)
        if name is None:
            raise ConfigurationError(
                f"quantization: {checkpoint.class_name} has no {' or '.join(DENOISERS)}"
            )
        requested = {name: model.quantization}
    else:
        requested = dict(model.quantization)
    for name, scheme in requested.items():
        if name not in checkpoint.components:
            known = ", ".join(checkpoint.components)
            raise ConfigurationError(
                f"quantization: unknown component {name!r}; expected one of {known}"
            )
        stored = stored_method(checkpoint.source(name))
        if stored is not None:
            raise ConfigurationError(
                f"quantization {scheme!r}: {checkpoint.source(name).weights} is already quantized "
                f"({stored}); leave quantization out for {name}"
            )
    return requested


def check_quantization(model: Model, checkpoint: Checkpoint, device: str | None = None) -> None:
    """Refuse what the installed libraries or the device can't load. Raises ConfigurationError.

    Without a device, only the libraries are checked.
    """
    for name, scheme in schemes(model, checkpoint).items():
        _need(f"quantization {scheme!r}", "torchao")
        _refuse_part_of_file(checkpoint, name, scheme)
    for name in checkpoint.components:
        source = checkpoint.source(name)
        config = None if source.is_file else stored_config(source.weights)
        if config is None:
            continue
        method = str(config.get("quant_method", "unknown"))
        what = f"{source.weights} is quantized with {method!r}, which"
        if method in PACKAGES:
            _need(what, method)
        if device is not None and method in NEEDS_GPU and torch.device(device).type == "cpu":
            raise ConfigurationError(f"{what} needs an accelerator; it can't run on the CPU")


def _refuse_part_of_file(checkpoint: Checkpoint, name: str, scheme: str) -> None:
    """Refuse to quantize part of a single file, except the denoiser or a text encoder's own file.

    diffusers can't quantize the others while loading.
    """
    source, (library, class_name) = checkpoint.source(name), checkpoint.index[name]
    if not source.is_file or name in DENOISERS:
        return
    header = read_header(source.weights)
    if library != "transformers" or of_component(header.tensors, name, class_name):
        raise ConfigurationError(
            f"quantization {scheme!r}: can't quantize the {name} from {source.weights}; set "
            f'components = {{ {name} = "..." }} to its folder'
        )


def check_plain(checkpoint: Checkpoint, placement: str) -> None:
    """Refuse a denoiser that isn't a folder of unquantized weights, for a placement that splits it.

    Such a placement reads individual weights from a diffusers folder. Raises ConfigurationError.
    """
    for name in DENOISERS:
        source = checkpoint.source(name)
        if name not in checkpoint.components:
            continue
        stored = stored_method(source)
        if source.is_file or stored:
            what = f"quantized ({stored})" if stored else "a single file"
            raise ConfigurationError(
                f"{source.weights} is {what}, but {placement} needs the {name} as a diffusers "
                "folder of unquantized weights; use one, or placement split or replica"
            )


def quantizers(model: Model, checkpoint: Checkpoint, device: str) -> dict[str, Any]:
    """Component -> the config for its library to quantize it while loading.

    Raises ConfigurationError.
    """
    check_quantization(model, checkpoint, device)
    configs: dict[str, Any] = {}
    for name, scheme in schemes(model, checkpoint).items():
        torchao = import_module("torchao.quantization")
        config = scheme_of(torchao, scheme, model, torch.device(device))
        log.info("quantized", model=model.name, component=name, scheme=type(config).__name__)
        if checkpoint.index[name][0] == "transformers":
            configs[name] = import_module("transformers").TorchAoConfig(config)
        else:
            configs[name] = TorchAoConfig(config)
    return configs


def scheme_of(torchao: Any, scheme: str, model: Model, device: torch.device) -> Any:
    """torchao's config: int8 weights, or fp8 arithmetic if the device supports it.

    Activations are scaled per row, so that no image depends on the others in its batch.
    """
    if scheme == "int8":
        return torchao.Int8WeightOnlyConfig()
    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    if has_fp8 and model.dtype == "bfloat16":
        return torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow())
    log.warning("fp8 weights only", model=model.name, device=str(device), dtype=model.dtype)
    return torchao.Float8WeightOnlyConfig()


def stored_config(folder: Path) -> Mapping[str, Any] | None:
    """The `quantization_config` in a component's config.json, or None."""
    try:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # `look_over` reports what's wrong with the file
        return None
    config = document.get("quantization_config") if isinstance(document, dict) else None
    return config if isinstance(config, dict) else None


def stored_method(source: Source) -> str | None:
    """How a component's stored weights are quantized (`Q4_0`, `nf4`, ...); None if they aren't."""
    if source.is_file:
        header = read_header(source.weights)
        if header.is_gguf:
            quantized = {k: n for k, n in header.types.items() if k not in ("F16", "F32", "BF16")}
            return max(quantized, key=lambda k: quantized[k]) if quantized else "GGUF"
        if not any(name.endswith(SCALE) for name in header.tensors):
            return None
        return "nvfp4" if any(n.endswith(".weight_scale_2") for n in header.tensors) else "fp8"
    config = stored_config(source.weights)
    if config is None:
        return None
    if config.get("load_in_4bit"):
        return str(config.get("bnb_4bit_quant_type", "fp4"))
    return "int8" if config.get("load_in_8bit") else str(config.get("quant_method", "unknown"))


def tensor_bytes(
    model: Model, checkpoint: Checkpoint, name: str, module: nn.Module
) -> dict[str, int] | None:
    """Tensor name -> bytes in memory, for a quantized component; None for others.

    `module` is its skeleton. The bytes are counted from the files, or estimated from the
    quantization method if only configs are present. Raises ConfigurationError and ModelUnavailable.
    """
    source = checkpoint.source(name)
    scheme = schemes(model, checkpoint).get(name)
    dense = {key: _bytes(t) for key, t in (*module.named_parameters(), *module.named_buffers())}
    if scheme is not None:
        return dense | dict(_quantized_bytes(module, scheme))
    if stored_method(source) is None:
        return None
    if source.is_file:
        header = read_header(source.weights)
        # Only linear weights stay quantized in memory; all other tensors are cast to the model's
        # dtype, so `dense` has their size. The file's scales come in addition.
        tensors = converted(name, type(module), source, header)
        linear = {key for key, _ in linear_weights(module)}
        return (
            dense
            | {
                key: tensor.numel() * tensor.element_size()
                for key, tensor in tensors.items()
                if key in linear and (isinstance(tensor, GGUFParameter) or _is_byte(tensor))
            }
            | {k: _bytes(t) for k, t in header.tensors.items() if k.endswith(SCALES)}
        )
    return _of_folder(source.weights, module, dense)


def _of_folder(folder: Path, module: nn.Module, dense: Mapping[str, int]) -> dict[str, int]:
    """Tensor name -> bytes for a quantized folder; plain tensors are cast to the model's dtype."""
    files = sorted(folder.glob("*.safetensors"))
    if files:
        sizes: dict[str, int] = {}
        shapes = {key: tuple(t.shape) for key, t in module.state_dict().items()}
        for path in files:
            for key, tensor in read_header(path).tensors.items():
                plain = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
                is_same = plain and shapes.get(key) == tuple(tensor.shape)
                sizes[key] = dense[key] if is_same else _bytes(tensor)
        stored = module.state_dict().keys()
        return {key: size for key, size in dense.items() if key not in stored} | sizes
    config = stored_config(folder) or {}
    method = str(config.get("quant_method")) + ("_4bit" if config.get("load_in_4bit") else "")
    per_value = _STORED_BYTES.get(method, 1.0)
    return dict(dense) | {key: int(t.numel() * per_value) for key, t in linear_weights(module)}


def _quantized_bytes(module: nn.Module, scheme: str) -> Iterator[tuple[str, int]]:
    """The names of the weights that torchao quantizes, with their bytes in memory."""
    # diffusers doesn't quantize modules that it keeps in float32, but transformers does.
    is_diffusers = hasattr(module, "load_config")
    in_float32 = (getattr(module, "_keep_in_fp32_modules", None) or ()) if is_diffusers else ()
    for key, weight in linear_weights(module):
        if not any(word in key.split(".") for word in in_float32):
            yield key, weight.numel() + weight.shape[0] * SCALE_BYTES[scheme]


def linear_weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of linear layers by name. Only these are quantized."""
    for path, inner in module.named_modules():
        if isinstance(inner, nn.Linear):
            yield f"{path}.weight" if path else "weight", inner.weight


def _is_byte(tensor: torch.Tensor) -> bool:
    return tensor.element_size() == 1


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _need(what: str, method: str) -> None:
    module, package = PACKAGES[method]
    with suppress(ModuleNotFoundError, ValueError):  # no parent package, or it's blocked
        if find_spec(module) is not None:
            return
    raise ConfigurationError(f"{what} needs the package {package}: pip install {package}")
