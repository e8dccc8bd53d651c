"""Check that a model can run on a device, and make it a thread's current device.

Every thread has its own current CUDA device, initially the first one. Streams are created, graphs
recorded and compiled kernels launched there, regardless of where the tensors are.
"""

import math
import re
from pathlib import Path

import torch
from safetensors import safe_open

from jobs.catalog import Model
from jobs.errors import ConfigurationError
from pipelines.loading.checkpoint import Checkpoint, look_over
from pipelines.loading.components import Source
from pipelines.loading.headers import read_header

LARGE = 10**9
"""Bytes of half-precision weights above which a model runs on a CPU only if its entry says so."""

HALF = ("bfloat16", "float16")

_PLAIN = re.compile(r"[^.]+\.safetensors")
"""The name of a weights file without a variant."""


def use_device(device: torch.device | None) -> None:
    """Make it the calling thread's current device; does nothing for the CPU or None."""
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)


def check_cuda(device: str) -> None:
    """Refuse a CUDA device that this torch can't use. Raises ConfigurationError."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        raise ConfigurationError(
            f"can't use {device}: torch {torch.__version__} is built without CUDA"
        )
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise ConfigurationError(f"{device} not found: torch sees {count} CUDA devices")


def check_device(model: Model, checkpoint: Checkpoint, device: str) -> None:
    """Refuse a device that can't be used, and a CPU that is too slow unless the entry chose it.

    The entry chooses the CPU with `devices = ["cpu"]`. Raises ConfigurationError, and
    ModelUnavailable for weights that can't be read.
    """
    check_cuda(device)
    if device != "cpu" or model.dtype not in HALF or set(model.devices) == {"cpu"}:
        return
    look_over(model, checkpoint)
    places = (checkpoint.source(name) for name in checkpoint.components)
    size = sum(2 * _weights_at(place, model.variant) for place in places)
    if size > LARGE:
        raise ConfigurationError(
            f"no accelerator is visible, and {size / 1e9:.1f} GB of {model.dtype} weights are too "
            'slow on a CPU; to run them there anyway, set devices = ["cpu"] in the entry'
        )


def _weights_at(place: Source, variant: str | None) -> int:
    """How many weights a component has, in a folder or a single file."""
    if not place.is_file:
        return weights_in(place.weights, variant)
    tensors = read_header(place.weights).tensors.values()
    return sum(math.prod(getattr(tensor, "quant_shape", tensor.shape)) for tensor in tensors)


def weights_in(folder: Path, variant: str | None) -> int:
    """How many weights a component has, from the headers of the files that diffusers would read."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [path for path in files if _PLAIN.fullmatch(path.name)]
    of_variant = [path for path in files if variant and f".{variant}" in path.name]
    return sum(map(_weights_of, of_variant or plain or files))


def _weights_of(file: Path) -> int:
    with safe_open(file, framework="pt") as opened:
        return sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118 - no dict
