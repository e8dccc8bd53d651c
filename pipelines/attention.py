"""Which attention kernel a denoiser runs: torch's own choice, or the catalog's if it runs.

What a device takes cannot be asked, only tried: kernels refuse by dtype, head size, mask and
driver. Chooses among diffusers' backends and knows no model. diffusers' `set_attention_backend`
also changes the default of everything else in the process, autoencoders with heads too large for
the fast kernels included; here it changes the denoiser alone.

Some backends pick their kernel through torch's flags, which hold for the whole process. While one
of them runs, attention on any other thread gets its kernel too: other bits, or an error. Such a
backend is served with one thread at a time inside the models (`FamilyPipeline.run_one_at_a_time`).
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

from jobs.errors import ConfigurationError, OutOfMemory

NATIVE = "native"
"""torch's own choice among its kernels: diffusers' default, and what every device takes."""

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
"""Backends that tell the log-sum-exp by which ring attention merges its parts (diffusers 0.42)."""

log = structlog.get_logger(__name__)


def choose_attention(
    denoiser: Any, backend: str | None, device: torch.device, trial: Callable[[], None]
) -> None:
    """Set the backend that the catalog names; without one, the denoiser keeps torch's own choice.

    `trial` runs the denoiser once and raises if it cannot. Raises ConfigurationError when the
    backend does not exist, is not installed or does not run, and when the environment
    chooses another default than torch's, since that would hold for every model in the process.
    """
    if DIFFUSERS_ATTN_BACKEND != NATIVE:
        raise ConfigurationError(
            f"DIFFUSERS_ATTN_BACKEND={DIFFUSERS_ATTN_BACKEND} changes attention in text encoders "
            "and autoencoders too: unset it, and set attention_backend in the model's entry"
        )
    if backend is not None:
        _demand(denoiser, backend, trial)
        log.info("attention backend", backend=backend, device=str(device))


@functools.cache
def sets_process_flags(backend: str) -> bool:
    """Whether the backend picks its kernel through flags of the whole process.

    Read from the names in the backend's code and in the functions that it calls, so that it holds
    for backends that diffusers adds. A name that isn't a backend of diffusers sets none.
    """
    function = _AttentionBackendRegistry._backends.get(backend)
    return function is not None and not FLAG_SETTERS.isdisjoint(_names(function))


def takes_backends(denoiser: Any) -> bool:
    """Whether any of its attention processors asks which backend to use; older ones do not."""
    return any(
        hasattr(getattr(module, "processor", None), "_attention_backend")
        for module in denoiser.modules()
    )


def backend_of(denoiser: Any) -> str | None:
    """The backend that its attention was set to; None when it follows the process's default."""
    for module in denoiser.modules():
        chosen = getattr(getattr(module, "processor", None), "_attention_backend", None)
        if chosen is not None:
            return str(AttentionBackendName(chosen).value)
    return None


def set_backend(denoiser: Any, backend: str) -> None:
    """Set a backend that `choose_attention` found to run, on another rank with a like device."""
    _set(denoiser, backend)


def check_backend(backend: str) -> None:
    """Raise ConfigurationError for a name that none of diffusers' backends has."""
    names = sorted(each.value for each in AttentionBackendName)
    if backend not in names:
        raise ConfigurationError(
            f"attention_backend {backend!r} does not exist; there is {', '.join(names)}"
        )


def check_parallel(backend: str | None, ring: int, split: bool, device: torch.device) -> None:
    """Refuse a backend that cannot attend over a `split` sequence, or not around a ring.

    Raises ConfigurationError.
    """
    name = backend or NATIVE
    able: set[str] = _AttentionBackendRegistry._supports_context_parallel
    if split and name not in able:
        raise ConfigurationError(
            f"attention_backend {name!r} cannot split a sequence; {', '.join(sorted(able))} can"
        )
    merges = name in MERGING or (name == NATIVE and device.type == "cpu")
    if ring > 1 and not merges:
        raise ConfigurationError(
            f"ring attention merges its parts by their log-sum-exp, which attention_backend "
            f"{name!r} does not tell on {device.type}; {', '.join(MERGING)} do, in half precision"
        )


def _demand(denoiser: Any, backend: str, trial: Callable[[], None]) -> None:
    name = f"attention_backend {backend!r}"
    if denoiser is None or not takes_backends(denoiser):
        raise ConfigurationError(f"{name}: {type(denoiser).__name__} lets none be chosen")
    try:
        _set(denoiser, backend)
    except (AttributeError, ValueError, RuntimeError, ImportError) as error:
        raise ConfigurationError(f"{name}: {error}") from error
    try:
        trial()
    except OutOfMemory:
        raise
    except Exception as error:  # whatever a kernel raises about a device, a dtype or a mask
        raise ConfigurationError(f"{name} does not run here: {_first_line(error)}") from error


def _set(denoiser: Any, backend: str) -> None:
    with attention_backend(NATIVE):  # on leaving, the process's default is what it was
        denoiser.set_attention_backend(backend)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _names(function: Callable[..., Any]) -> set[str]:
    """Names that a function refers to, and those that functions of these names refer to."""
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
            pending += [inspect.unwrap(each) for each in called if callable(each)]
    return names


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
