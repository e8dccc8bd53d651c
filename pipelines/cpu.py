"""Make a pipeline faster on a CPU, with results that equal diffusers' up to rounding.

Modules are found by their class, so this works for every family. Other devices are unaffected.
"""

import math
from typing import Any

import torch
from diffusers.models.activations import GELU

_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR


def tune(pipe: Any, denoiser: Any, device: torch.device) -> None:
    """Tune a loaded pipeline for the CPU; `denoiser` is the module that runs the denoising steps.

    The autoencoder's convolutions get channels-last weights, which halves oneDNN's time if there
    are few channels. GELU's tanh form is replaced with `gelu_tanh`.
    """
    if device.type != "cpu":
        return
    vae = getattr(pipe, "vae", None)
    if isinstance(vae, torch.nn.Module):
        for weight in vae.parameters():
            if weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    if not isinstance(denoiser, torch.nn.Module):
        return
    for module in denoiser.modules():
        if isinstance(module, GELU) and module.approximate == "tanh":
            module.gelu = gelu_tanh
        elif type(module) is torch.nn.GELU and module.approximate == "tanh":
            module.forward = gelu_tanh  # type: ignore[method-assign, assignment]


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU's tanh form (arXiv:1606.08415) as x sigmoid(2u), which equals x (1 + tanh u) / 2.

    u = sqrt(2 / pi) (x + 0.044715 x^3). torch computes a tanh per element, which takes four times
    as long as a sigmoid. Half precision is left to torch, which rounds only once.
    """
    if x.dtype is not torch.float32 or torch.is_grad_enabled():
        return torch.nn.functional.gelu(x, approximate="tanh")
    inner = torch.addcmul(x.new_tensor(_LINEAR), x, x, value=_CUBIC)
    return inner.mul_(x).sigmoid_().mul_(x)
