"""Choose a denoiser's attention kernel: torch's own choice, or the catalog's if it works.

Whether a device supports a kernel can only be tried, because kernels refuse by dtype, head size,
mask and driver. The choice is among diffusers' backends. diffusers' `set_attention_backend` also
changes the default for everything else in the process, including autoencoders whose heads are too
large for the fast kernels; here only the denoiser changes.

Some backends select their kernel through torch's flags, which are global to the process. While such
a backend runs, attention on any other thread uses its kernel too, which gives different bits or an
error. With these backends only one thread at a time runs inside the models
(`FamilyPipeline.run_one_at_a_time`).
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import structlog
import torch
from diffusers import attention_backend
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND

from jobs.errors import ConfigurationError, OutOfMemory, first_line

NATIVE = "native"
"""torch's own choice among its kernels: diffusers' default, supported by every device."""

CUDNN = "_native_cudnn"

FLAG_SETTERS = frozenset(
    ["sdpa_kernel", "_sdpa_kernel", "sdp_kernel"]
    + [f"enable_{kernel}_sdp" for kernel in ("flash", "mem_efficient", "math", "cudnn")]
)
"""Functions of torch that switch attention kernels on and off for all threads."""

MERGING = (
    CUDNN,
    "_native_flash",
    "flash",
    "flash_hub",
    "_flash_3_hub",
    "sage",
    "sage_hub",
)
"""Backends that return the log-sum-exp, which ring attention needs to merge (diffusers 0.42)."""

log = structlog.get_logger(__name__)


def choose_attention(
    denoiser: Any, backend: str | None, device: torch.device, trial: Callable[[], None]
) -> None:
    """Set the catalog's backend, if any; otherwise the denoiser keeps torch's own choice.

    `trial` runs the denoiser once and raises if that fails. Raises ConfigurationError if the
    backend doesn't exist, isn't installed or doesn't run. It's also raised if the environment
    changes diffusers' default, because that would affect every model in the process.
    """
    if DIFFUSERS_ATTN_BACKEND != NATIVE:
        raise ConfigurationError(
            f"DIFFUSERS_ATTN_BACKEND={DIFFUSERS_ATTN_BACKEND} changes attention in text encoders "
            "and autoencoders too; unset it, and set attention_backend in the model's entry"
        )
    if backend is not None:
        _demand(denoiser, backend, trial)
        log.info("attention backend", backend=backend, device=str(device))


@functools.cache
def sets_process_flags(backend: str) -> bool:
    """Whether the backend selects its kernel through process-wide flags.

    This is read from the names used in the backend's code and in the functions it calls, so that it
    also works for backends that diffusers adds later. False for unknown backends.
    """
    function = _AttentionBackendRegistry._backends.get(backend)
    return function is not None and not FLAG_SETTERS.isdisjoint(_names(function))


def takes_backends(denoiser: Any) -> bool:
    """Whether any of its attention processors supports backends; older ones don't."""
    return any(
        hasattr(getattr(module, "processor", None), "_attention_backend")
        for module in denoiser.modules()
    )


def backend_of(denoiser: Any) -> str | None:
    """The backend that its attention was set to; None if it uses the process's default."""
    for module in denoiser.modules():
        backend = getattr(getattr(module, "processor", None), "_attention_backend", None)
        if backend is not None:
            return str(AttentionBackendName(backend).value)
    return None


def set_backend(denoiser: Any, backend: str) -> None:
    """Set a backend that `choose_attention` tried on another rank with the same kind of device."""
    _set(denoiser, backend)


def check_backend(backend: str) -> None:
    """Raise ConfigurationError for a name that isn't one of diffusers' backends."""
    names = sorted(name.value for name in AttentionBackendName)
    if backend not in names:
        raise ConfigurationError(
            f"unknown attention_backend {backend!r}; expected one of {', '.join(names)}"
        )


def check_parallel(backend: str | None, ring: int, split: bool, device: torch.device) -> None:
    """Refuse a backend that doesn't support a `split` sequence or a ring.

    Raises ConfigurationError.
    """
    name = backend or NATIVE
    splitting: set[str] = _AttentionBackendRegistry._supports_context_parallel
    if split and name not in splitting:
        raise ConfigurationError(
            f"attention_backend {name!r} can't split a sequence; use one of "
            f"{', '.join(sorted(splitting))}"
        )
    merges = name in MERGING or (name == NATIVE and device.type == "cpu")
    if ring > 1 and not merges:
        raise ConfigurationError(
            f"ring attention needs the log-sum-exp, which attention_backend {name!r} doesn't "
            f"return on {device.type}; in half precision, {', '.join(MERGING)} do"
        )


def _demand(denoiser: Any, backend: str, trial: Callable[[], None]) -> None:
    name = f"attention_backend {backend!r}"
    if denoiser is None or not takes_backends(denoiser):
        raise ConfigurationError(f"{name}: {type(denoiser).__name__} doesn't support backends")
    try:
        _set(denoiser, backend)
    except (AttributeError, ValueError, RuntimeError, ImportError) as error:
        raise ConfigurationError(f"{name}: {error}") from error
    try:
        trial()
    except OutOfMemory:
        raise
    except Exception as error:  # kernels raise anything about a device, a dtype or a mask
        raise ConfigurationError(f"{name} doesn't run here: {first_line(error)}") from error


def _set(denoiser: Any, backend: str) -> None:
    with attention_backend(NATIVE):  # restores the process's default on exit
        denoiser.set_attention_backend(backend)


def _names(function: Callable[..., Any]) -> set[str]:
    """Names that a function uses, and those that the functions it calls use, recursively."""
    names: set[str] = set()
    pending: list[Any] = [inspect.unwrap(function)]
    seen: set[Any] = set()
    while pending:
        current = pending.pop()
        if current in seen or not isinstance(current, FunctionType):
            continue
        seen.add(current)
        for code in _codes(current.__code__):
            names.update(code.co_names)
            called = (current.__globals__.get(name) for name in code.co_names)
            pending += [inspect.unwrap(value) for value in called if callable(value)]
    return names


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code object, and those of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
