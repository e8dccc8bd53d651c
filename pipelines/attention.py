"""Which attention kernel a denoiser runs: the catalog's, or the fastest one that its device takes.

What a device takes cannot be asked, only tried: kernels refuse by dtype, head size, mask and
driver. Chooses among diffusers' backends and knows no model. diffusers' `set_attention_backend`
also changes the default of everything else in the process, autoencoders with heads too large for
the fast kernels included; here it changes the denoiser alone.
"""

from collections.abc import Callable
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
    denoiser: Any, wanted: str | None, device: torch.device, trial: Callable[[], None]
) -> None:
    """Set the backend that the catalog wants, else cuDNN's on CUDA; leave other devices alone.

    `trial` runs the denoiser once and raises if it cannot. Raises ConfigurationError when the
    wanted backend does not exist, is not installed or does not run; where nothing is wanted, falls
    back to torch's own choice and logs why.
    """
    if wanted is not None:
        _demand(denoiser, wanted, trial)
        log.info("attention backend", backend=wanted, device=str(device), chosen_by="catalog")
    elif _may_run_cudnn(denoiser, device):
        _prefer(denoiser, CUDNN, device, trial)


def _may_run_cudnn(denoiser: Any, device: torch.device) -> bool:
    """Whether it is worth a trial. A default from diffusers' own environment variable stays."""
    return (
        device.type == "cuda"
        and torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
        and denoiser is not None
        and denoiser.dtype in (torch.float16, torch.bfloat16)
        and takes_backends(denoiser)
        and DIFFUSERS_ATTN_BACKEND == NATIVE
    )


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


def _demand(denoiser: Any, wanted: str, trial: Callable[[], None]) -> None:
    name = f"attention_backend {wanted!r}"
    if denoiser is None or not takes_backends(denoiser):
        raise ConfigurationError(f"{name}: {type(denoiser).__name__} lets none be chosen")
    try:
        _set(denoiser, wanted)
    except (AttributeError, ValueError, RuntimeError, ImportError) as error:
        raise ConfigurationError(f"{name}: {error}") from error
    try:
        trial()
    except OutOfMemory:
        raise
    except Exception as error:  # whatever a kernel raises about a device, a dtype or a mask
        raise ConfigurationError(f"{name} does not run here: {_first_line(error)}") from error


def _prefer(denoiser: Any, backend: str, device: torch.device, trial: Callable[[], None]) -> None:
    reason = None
    try:
        _set(denoiser, backend)
        trial()
    except OutOfMemory:
        raise
    except Exception as error:
        reason = _first_line(error)
    if reason is None:
        log.info("attention backend", backend=backend, device=str(device), chosen_by="device")
        return
    _set(denoiser, NATIVE)
    log.warning(
        "attention backend", backend=NATIVE, device=str(device), instead_of=backend, reason=reason
    )


def _set(denoiser: Any, backend: str) -> None:
    with attention_backend(NATIVE):  # on leaving, the process's default is what it was
        denoiser.set_attention_backend(backend)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
