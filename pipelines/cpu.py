"""Make a pipeline faster on a CPU, with results that equal diffusers' up to rounding.

Makes a sample's bits independent of its batch too, as far as possible: torch multiplies one row by
another kernel than several, so rows are multiplied one by one where a sample has only one.

Modules are found by their class, so this works for every family. Other devices are unaffected.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.activations import GELU

_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR


def tune(pipe: Any, denoiser: Any, device: torch.device) -> None:
    """Tune a loaded pipeline for the CPU; `denoiser` is the module that runs the denoising steps.

    The autoencoder's convolutions get channels-last weights, which halves oneDNN's time if there
    are few channels. GELU's tanh form is replaced with `gelu_tanh`, and linear layers go through
    `by_row`.
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
        if isinstance(module, torch.nn.Linear):
            module.forward = functools.partial(by_row, module.forward)  # type: ignore[method-assign]
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


def by_row(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """A linear layer's output; one vector per sample (a timestep, a pooled prompt) goes alone.

    Reading the weights once per sample costs little, because the other layers multiply hundreds or
    thousands of rows per sample.
    """
    if x.shape[0] == 1 or x.numel() != x.shape[0] * x.shape[-1]:
        return forward(x)
    # Each row is copied, because kernels may also choose by how their input is aligned in memory.
    return torch.cat([forward(row.clone()) for row in torch.split(x, 1)])
