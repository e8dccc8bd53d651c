"""One component of a pipeline from wherever its weights are: a folder, or a single file.

A single file is checked against the component's config before anything is loaded: diffusers'
own conversion of names runs over the file's header, and every name and shape must be the model's.
So a file of another model, or of half of one, is refused in a second, and nothing is ever left at
random values. Knows no pipeline and no placement.
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

from jobs.errors import ModelUnavailable
from pipelines.loading.contents import of_component
from pipelines.loading.headers import SUFFIXES, Header, first_line, read_header
from pipelines.loading.transient import may_pass
from pipelines.out_of_memory import is_out_of_memory

DENOISERS = ("transformer", "unet")
"""Names of the component that makes the steps; the first that a pipeline has."""

SCALE = ".weight_scale"
SCALES = (SCALE, ".weight_scale_2", ".input_scale")
"""Endings of the scales of Black Forest Labs' fp8 and nvfp4 files, which diffusers reads."""

_FOREIGN_SCALES = (".scale_weight", ".scale_input", "scaled_fp8", ".weight_quant", ".comfy_quant")
_PACKED = (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a component comes from: its weights, a folder or a file, and its config's folder."""

    weights: Path
    config: Path

    @property
    def is_file(self) -> bool:
        """Whether the weights are a single file."""
        return self.weights.suffix.lower() in SUFFIXES


def component_class(library: str, class_name: str) -> Any:
    """The class that a model_index.json names; None where its library doesn't have it."""
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
    """The component, its weights on `device`, in `dtype` where they aren't quantized.

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
    except Exception as error:  # any library's; the file is at fault or too new
        if is_out_of_memory(error):
            raise
        raise ModelUnavailable(
            f"{source.weights} can't be loaded: {first_line(error)}", may_pass=may_pass(error)
        ) from error


def _from_folder(
    kind: Any, source: Source, dtype: torch.dtype, device: str, variant: str | None, quantize: Any
) -> nn.Module:
    """As its library loads it, straight to one device."""
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
    """A text encoder out of a whole checkpoint, or from a file under transformers' own names."""
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
        raise ModelUnavailable(
            f"{source.weights} isn't the {kind.__name__} that {source.config} describes: "
            f"it lacks {lacks}"
        )
    return cast(nn.Module, module)


def check_file(name: str, kind: Any, source: Source, header: Header) -> None:
    """Check names, shapes and dtypes of the file's header. Raises ModelUnavailable."""
    if not _is_diffusers(kind):
        if header.is_gguf:
            raise ModelUnavailable(
                f"{source.weights} is a GGUF, and a text encoder isn't loaded from one: name its "
                "safetensors, and quantize them with quantization = { "
                f'{name} = "int8" }} if they are too large'
            )
        return
    _check_dtypes(source, header)
    expected = _skeleton(kind, source.config).state_dict()
    held = converted(name, kind, source, header)
    what = f"{source.weights} isn't the {kind.__name__} that {source.config} describes"
    missing = next((key for key in expected if key not in held), None)
    if missing is not None:
        raise ModelUnavailable(f"{what}: it lacks {missing}; {_way_out(source)}")
    for key, tensor in expected.items():
        shape = tuple(getattr(held[key], "quant_shape", held[key].shape))
        if shape != tuple(tensor.shape) and not _is_nvfp4(header, held[key]):
            raise ModelUnavailable(
                f"{what}: {key} has the shape {list(shape)} instead of {list(tensor.shape)}; "
                + _way_out(source)
            )


def _way_out(source: Source) -> str:
    return 'name a file of that model, or its own configs with config = "..."'


def converted(name: str, kind: Any, source: Source, header: Header) -> Mapping[str, torch.Tensor]:
    """The header's tensors under the model's names. Raises ModelUnavailable."""
    own = own_tensors(name, kind, header.tensors)
    own = {key: tensor for key, tensor in own.items() if not key.endswith(SCALES)}
    expected = _skeleton(kind, source.config).state_dict()
    mapping = _converter(kind)
    if mapping is None or own.keys() >= expected.keys():
        return own
    try:
        config = kind.load_config(source.config)
        made: Mapping[str, torch.Tensor] = mapping(checkpoint=dict(own), config=config)
    except Exception as error:  # converters look up what a file of another model lacks
        raise ModelUnavailable(
            f"{source.weights} isn't the {kind.__name__} that {source.config} describes: "
            + _way_out(source)
        ) from error
    return made


def own_tensors(name: str, kind: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The component's tensors: those of a file by itself, or its part of a whole checkpoint."""
    return of_component(tensors, name, kind.__name__) or dict(tensors)


def _check_dtypes(source: Source, header: Header) -> None:
    if any(name.endswith(".qweight") for name in header.tensors):
        raise ModelUnavailable(
            f"{source.weights} is quantized by SVDQuant, GPTQ or AWQ, which diffusers doesn't read "
            "from a single file: take an SVDQuant model as a diffusers folder (nunchaku_lite; it "
            "needs the package kernels), or a GGUF"
        )
    foreign = next((n for n in header.tensors if n.endswith(_FOREIGN_SCALES)), None)
    packed = next((n for n in header.tensors if n.endswith(_PACKED)), None)
    if foreign or packed:
        raise ModelUnavailable(
            f"{source.weights} is quantized in a way that diffusers doesn't read from a single "
            f"file ({foreign or packed}): take a GGUF, an unquantized file with quantization = "
            '"fp8", or a diffusers folder'
        )
    if any(name.endswith(SCALE) for name in header.tensors):
        return
    for name, tensor in header.tensors.items():
        is_number = tensor.is_floating_point() or isinstance(tensor, GGUFParameter)
        if not is_number and tensor.dim() > 1:
            raise ModelUnavailable(
                f"{source.weights} stores {name} as {str(tensor.dtype).removeprefix('torch.')}: "
                "weights are floating point numbers; take an unquantized file or a GGUF"
            )


def _is_nvfp4(header: Header, tensor: torch.Tensor) -> bool:
    """Two values in a byte: only diffusers' quantizer tells the shape."""
    return tensor.dtype == torch.uint8 and any(n.endswith(SCALE) for n in header.tensors)


def _stored_quantization(header: Header, dtype: torch.dtype) -> Any:
    """The quantizer for what the file holds, None for plain weights."""
    if header.is_gguf:
        return GGUFQuantizationConfig(compute_dtype=dtype)
    if any(name.endswith(SCALE) for name in header.tensors):
        return BFLQuantizationConfig(compute_dtype=dtype)
    return None


def _restore_others(module: nn.Module, dtype: torch.dtype) -> None:
    """Dequantize what isn't the weight of a linear layer: diffusers would use its bytes as numbers.

    Such are biases, norms and convolutions that a GGUF stores quantized or in bfloat16.
    """
    for inner in module.modules():
        for name, tensor in list(inner._parameters.items()):
            is_weight = isinstance(inner, GGUFLinear) and name == "weight"
            if isinstance(tensor, GGUFParameter) and not is_weight:
                plain = dequantize_gguf_tensor(tensor).to(dtype)
                inner._parameters[name] = nn.Parameter(plain, requires_grad=False)


def _complete(module: nn.Module, source: Source) -> nn.Module:
    """The module, none of whose tensors was left out. Raises ModelUnavailable."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    missing = next((name for name, tensor in tensors if tensor.is_meta), None)
    if missing is not None:
        raise ModelUnavailable(
            f"{source.weights} isn't the {type(module).__name__} that {source.config} describes: "
            f"it lacks {missing}"
        )
    return module


def _skeleton(kind: Any, config: Path) -> nn.Module:
    with torch.device("meta"):
        module: nn.Module = kind.from_config(kind.load_config(config))
    return module


def _converter(kind: Any) -> Any:
    """diffusers' conversion of original names for a class, None where it has none."""
    name = _get_single_file_loadable_mapping_class(kind)
    return None if name is None else SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]


def _is_clip_of_checkpoint(tensors: Mapping[str, Any]) -> bool:
    prefixes = ("cond_stage_model.", "conditioner.", "text_encoders.")
    return any(key.startswith(prefixes) for key in tensors)


def _is_diffusers(kind: Any) -> bool:
    return hasattr(kind, "load_config")


@contextmanager
def naming(model_name: str) -> Iterator[None]:
    """Put the model's name before a ModelUnavailable that comes without it."""
    try:
        yield
    except ModelUnavailable as error:
        sentence = f"model {model_name!r}: {error}"
        raise ModelUnavailable(sentence, may_pass=error.may_pass) from error
