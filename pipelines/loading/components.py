"""Load one component of a pipeline from a folder or a single file.

A single file is checked against the component's config before anything is loaded: diffusers' own
name conversion runs over the file's header, and every name and shape must match the model. A file
of another model, or half a file, is refused within a second, and no weight is ever left at random
values. This module doesn't depend on pipelines or placements.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from diffusers import BFLQuantizationConfig, GGUFQuantizationConfig
from diffusers.loaders.single_file_model import (
    SINGLE_FILE_LOADABLE_CLASSES,
    _get_single_file_loadable_mapping_class,
)
from diffusers.loaders.single_file_utils import (
    create_diffusers_clip_model_from_ldm,
    create_diffusers_t5_model_from_checkpoint,
)
from diffusers.models.model_loading_utils import load_state_dict
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor
from torch import nn

from jobs.errors import ModelUnavailable, first_line
from pipelines.loading.contents import of_component
from pipelines.loading.headers import SUFFIXES, Header, read_header
from pipelines.loading.transient import may_pass
from pipelines.out_of_memory import is_out_of_memory

DENOISERS = ("transformer", "unet")
"""Names of the component that runs the denoising steps; the first one that a pipeline has."""

SCALE = ".weight_scale"
SCALES = (SCALE, ".weight_scale_2", ".input_scale")
"""Suffixes of the scales in Black Forest Labs' fp8 and nvfp4 files, which diffusers can read."""

_FOREIGN_SCALES = (".scale_weight", ".scale_input", "scaled_fp8", ".weight_quant", ".comfy_quant")
_PACKED = (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4")

_WAY_OUT = 'use a file of that model, or set config = "..." to the configs that match the file'


@dataclass(frozen=True, slots=True)
class Source:
    """Where a component comes from: its weights (a folder or a file) and its config's folder."""

    weights: Path
    config: Path

    @property
    def is_file(self) -> bool:
        """Whether the weights are a single file."""
        return self.weights.suffix.lower() in SUFFIXES


def component_class(library: str, class_name: str) -> Any:
    """The class named in a model_index.json; None if its library doesn't have it."""
    pipelines = import_module("diffusers").pipelines
    if hasattr(pipelines, library):
        return getattr(getattr(pipelines, library), class_name, None)
    try:
        return getattr(import_module(library), class_name, None)
    except ModuleNotFoundError:
        return None


def read_component(
    name: str,
    kind: Any,
    source: Source,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    variant: str | None = None,
    quantize: Any = None,
) -> Any:
    """Load the component onto `device`, in `dtype` unless its weights are quantized.

    `quantize` is the config of diffusers' or transformers' quantizer, to quantize while loading.
    Raises ModelUnavailable without the model's name, and torch's own out-of-memory error.
    """
    try:
        if source.is_file:
            return _from_file(name, kind, source, dtype, device, quantize)
        if not issubclass(kind, nn.Module):
            return kind.from_pretrained(source.weights)
        return _from_folder(kind, source, dtype, device, variant, quantize)
    except ModelUnavailable:
        raise
    except Exception as error:  # from any library: the file is broken or too new
        if is_out_of_memory(error):
            raise
        raise ModelUnavailable(
            f"can't load {source.weights}: {first_line(error)}", may_pass=may_pass(error)
        ) from error


def _from_folder(
    kind: Any, source: Source, dtype: torch.dtype, device: str, variant: str | None, quantize: Any
) -> nn.Module:
    """Load with the component's own library, straight to one device."""
    options: dict[str, Any] = {} if device == "cpu" else {"device_map": {"": device}}
    options["torch_dtype" if _is_diffusers(kind) else "dtype"] = dtype
    if quantize is not None:
        options["quantization_config"] = quantize
    module: nn.Module = kind.from_pretrained(
        source.weights, variant=variant, use_safetensors=True, **options
    )
    module.__dict__.pop("hf_device_map", None)
    return module.eval()


def _from_file(
    name: str, kind: Any, source: Source, dtype: torch.dtype, device: str, quantize: Any
) -> nn.Module:
    header = read_header(source.weights)
    check_file(name, kind, source, header)
    tensors = own_tensors(name, kind, load_state_dict(str(source.weights)))
    if _is_diffusers(kind) and _converter(kind) is not None:
        module = kind.from_single_file(
            tensors,
            config=str(source.config),
            torch_dtype=dtype,
            local_files_only=True,
            quantization_config=quantize or _stored_quantization(header, dtype),
            device=device,
        )
        module.__dict__.pop("hf_device_map", None)
        _restore_others(module, dtype)
    elif _is_diffusers(kind):
        with init_empty_weights():
            module = kind.from_config(kind.load_config(source.config))
        module.load_state_dict(tensors, strict=True, assign=True)
        module.to(device, dtype)
    else:
        module = _text_encoder(kind, source, tensors, dtype, quantize)
        module.to(device)
    return _complete(module.eval(), source)


def _text_encoder(
    kind: Any, source: Source, tensors: dict[str, Any], dtype: torch.dtype, quantize: Any
) -> nn.Module:
    """Load a text encoder from a whole checkpoint, or from a file with transformers' names."""
    config = kind.config_class.from_pretrained(source.config)
    arguments = {"config": str(source.config), "torch_dtype": dtype, "local_files_only": True}
    if any(key.startswith("text_encoders.t5xxl.") for key in tensors):
        return cast(
            nn.Module, create_diffusers_t5_model_from_checkpoint(kind, tensors, **arguments)
        )
    if _is_clip_of_checkpoint(tensors):
        return cast(nn.Module, create_diffusers_clip_model_from_ldm(kind, tensors, **arguments))
    options = {} if quantize is None else {"quantization_config": quantize}
    module, report = kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, **options
    )
    missing = sorted(report["missing_keys"])
    if missing or report["mismatched_keys"]:
        lacks = missing[0] if missing else str(next(iter(report["mismatched_keys"])))
        raise ModelUnavailable(f"{_mismatch(kind, source)}: it's missing {lacks}")
    return cast(nn.Module, module)


def check_file(name: str, kind: Any, source: Source, header: Header) -> None:
    """Check the names, shapes and dtypes in the file's header. Raises ModelUnavailable."""
    if not _is_diffusers(kind):
        if header.is_gguf:
            raise ModelUnavailable(
                f"{source.weights} is a GGUF, but text encoders can't be loaded from one; use "
                f'safetensors, with quantization = {{ {name} = "int8" }} if they are too large'
            )
        return
    _check_dtypes(source, header)
    expected = _skeleton(kind, source.config).state_dict()
    tensors = converted(name, kind, source, header)
    mismatch = _mismatch(kind, source)
    missing = next((key for key in expected if key not in tensors), None)
    if missing is not None:
        raise ModelUnavailable(f"{mismatch}: it's missing {missing}; {_WAY_OUT}")
    for key, tensor in expected.items():
        shape = tuple(getattr(tensors[key], "quant_shape", tensors[key].shape))
        if shape != tuple(tensor.shape) and not _is_nvfp4(header, tensors[key]):
            raise ModelUnavailable(
                f"{mismatch}: {key} has shape {list(shape)}, expected {list(tensor.shape)}; "
                + _WAY_OUT
            )


def _mismatch(kind: Any, source: Source) -> str:
    return f"{source.weights} isn't the {kind.__name__} described by {source.config}"


def converted(name: str, kind: Any, source: Source, header: Header) -> Mapping[str, torch.Tensor]:
    """The header's tensors by the model's names for them. Raises ModelUnavailable."""
    own = own_tensors(name, kind, header.tensors)
    own = {key: tensor for key, tensor in own.items() if not key.endswith(SCALES)}
    expected = _skeleton(kind, source.config).state_dict()
    mapping = _converter(kind)
    if mapping is None or own.keys() >= expected.keys():
        return own
    try:
        config = kind.load_config(source.config)
        tensors: Mapping[str, torch.Tensor] = mapping(checkpoint=dict(own), config=config)
    except Exception as error:  # converters look up tensors that a file of another model lacks
        raise ModelUnavailable(f"{_mismatch(kind, source)}; {_WAY_OUT}") from error
    return tensors


def own_tensors(name: str, kind: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The component's tensors: its part of a whole checkpoint, or all tensors of its own file."""
    return of_component(tensors, name, kind.__name__) or dict(tensors)


def _check_dtypes(source: Source, header: Header) -> None:
    if any(name.endswith(".qweight") for name in header.tensors):
        raise ModelUnavailable(
            f"{source.weights} is quantized with SVDQuant, GPTQ or AWQ, which diffusers can't read "
            "from a single file; use a GGUF, or a diffusers folder of an SVDQuant model "
            "(nunchaku_lite, which needs the package kernels)"
        )
    foreign = next((n for n in header.tensors if n.endswith(_FOREIGN_SCALES)), None)
    packed = next((n for n in header.tensors if n.endswith(_PACKED)), None)
    if foreign or packed:
        raise ModelUnavailable(
            f"{source.weights} is quantized in a format that diffusers can't read from a single "
            f"file ({foreign or packed}); use a GGUF, an unquantized file with quantization = "
            '"fp8", or a diffusers folder'
        )
    if any(name.endswith(SCALE) for name in header.tensors):
        return
    for name, tensor in header.tensors.items():
        is_number = tensor.is_floating_point() or isinstance(tensor, GGUFParameter)
        if not is_number and tensor.dim() > 1:
            raise ModelUnavailable(
                f"{source.weights} stores {name} as {str(tensor.dtype).removeprefix('torch.')}, "
                "but weights must be floating point; use an unquantized file or a GGUF"
            )


def _is_nvfp4(header: Header, tensor: torch.Tensor) -> bool:
    """Whether the tensor has two values per byte, so only diffusers' quantizer knows its shape."""
    return tensor.dtype == torch.uint8 and any(n.endswith(SCALE) for n in header.tensors)


def _stored_quantization(header: Header, dtype: torch.dtype) -> Any:
    """The quantizer's config for the weights in the file; None if they aren't quantized."""
    if header.is_gguf:
        return GGUFQuantizationConfig(compute_dtype=dtype)
    if any(name.endswith(SCALE) for name in header.tensors):
        return BFLQuantizationConfig(compute_dtype=dtype)
    return None


def _restore_others(module: nn.Module, dtype: torch.dtype) -> None:
    """Dequantize tensors that aren't the weight of a linear layer.

    These are biases, norms and convolutions that a GGUF stores quantized or in bfloat16. diffusers
    would use their bytes as numbers.
    """
    for inner in module.modules():
        for name, tensor in list(inner._parameters.items()):
            is_weight = isinstance(inner, GGUFLinear) and name == "weight"
            if isinstance(tensor, GGUFParameter) and not is_weight:
                plain = dequantize_gguf_tensor(tensor).to(dtype)
                inner._parameters[name] = nn.Parameter(plain, requires_grad=False)


def _complete(module: nn.Module, source: Source) -> nn.Module:
    """The module, if all its tensors were loaded. Raises ModelUnavailable."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    missing = next((name for name, tensor in tensors if tensor.is_meta), None)
    if missing is not None:
        raise ModelUnavailable(f"{_mismatch(type(module), source)}: it's missing {missing}")
    return module


def _skeleton(kind: Any, config: Path) -> nn.Module:
    with torch.device("meta"):
        module: nn.Module = kind.from_config(kind.load_config(config))
    return module


def _converter(kind: Any) -> Any:
    """diffusers' function that converts original names for a class; None if it has none."""
    name = _get_single_file_loadable_mapping_class(kind)
    return None if name is None else SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]


def _is_clip_of_checkpoint(tensors: Mapping[str, Any]) -> bool:
    prefixes = ("cond_stage_model.", "conditioner.", "text_encoders.")
    return any(key.startswith(prefixes) for key in tensors)


def _is_diffusers(kind: Any) -> bool:
    return hasattr(kind, "load_config")


@contextmanager
def naming(model_name: str) -> Iterator[None]:
    """Prefix the message of a ModelUnavailable with the model's name."""
    try:
        yield
    except ModelUnavailable as error:
        sentence = f"model {model_name!r}: {error}"
        raise ModelUnavailable(sentence, may_pass=error.may_pass) from error
