"""Muon for weight matrices, Adam for everything else, as one optimiser.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) replaces a matrix's
momentum by the nearest orthogonal matrix, found by a few Newton-Schulz rounds. Its
step is scaled by 0.2 * sqrt(longer side) to match the usual size of Adam's, so both
share one learning rate.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor

MOMENTUM: Final = 0.95
BETAS: Final = (0.9, 0.99)
EPSILON: Final = 1e-8


def orthogonalised(matrices: Tensor, rounds: int = 5) -> Tensor:
    """The (N, rows, columns) matrices with all singular values moved close to 1."""
    tall = matrices.size(-2) > matrices.size(-1)
    result: Tensor = matrices.mT if tall else matrices
    result = result / (result.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = result @ result.mT
        result = 3.4445 * result + (-4.7750 * gram + 2.0315 * gram @ gram) @ result
    return result.mT if tall else result


class Muon(torch.optim.Optimizer):
    """Parameter groups with `orthogonal=True` take Muon's step, others Adam's.

    `half=True` orthogonalises in bfloat16, which is exact enough and, on processors
    with matrix units, several times as fast.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        defaults = {"orthogonal": False, "half": False, "weight_decay": 0.0, "taken": 0}
        super().__init__(groups, {"lr": 1e-3, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter with a gradient; `closure` isn't supported."""
        assert closure is None
        for group in self.param_groups:
            group["taken"] += 1
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            if group["orthogonal"]:
                self._muon_step(parameters, group["lr"], group["half"])
            else:
                self._adam_step(parameters, group["lr"], group["taken"])

    def _muon_step(self, parameters: list[Tensor], rate: float, half: bool) -> None:
        by_shape: defaultdict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter in parameters:
            state = self.state[parameter]
            gradient = parameter.grad
            assert gradient is not None
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].mul_(MOMENTUM).add_(gradient)
            update = (gradient + MOMENTUM * state["momentum"]).flatten(1)
            by_shape[update.size(0), update.size(1)].append((parameter, update))
        for shape, members in by_shape.items():
            stacked = torch.stack([update for _, update in members])
            updates = orthogonalised(stacked.bfloat16() if half else stacked).float()
            for (parameter, _), update in zip(members, updates, strict=True):
                parameter.add_(update.view(parameter.shape), alpha=-rate * 0.2 * max(shape) ** 0.5)

    def _adam_step(self, parameters: list[Tensor], rate: float, taken: int) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["mean"] = torch.zeros_like(parameter)
                state["square"] = torch.zeros_like(parameter)
        means = [self.state[parameter]["mean"] for parameter in parameters]
        squares = [self.state[parameter]["square"] for parameter in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_lerp_(means, gradients, 1 - BETAS[0])
        torch._foreach_mul_(squares, BETAS[1])
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - BETAS[1])
        scales = torch._foreach_sqrt(squares)
        torch._foreach_div_(scales, (1 - BETAS[1] ** taken) ** 0.5)
        torch._foreach_add_(scales, EPSILON)
        torch._foreach_addcdiv_(parameters, means, scales, -rate / (1 - BETAS[0] ** taken))


def matrices_and_rest(
    module: torch.nn.Module, apart: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The module's parameters by name: those for Muon, and those for Adam.

    Muon takes the matrices, except those whose name matches the pattern `apart`:
    embeddings, modulation, the first and last layer.
    """
    matrices: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        is_matrix = parameter.ndim == 2 and not re.search(apart, name)
        (matrices if is_matrix else rest)[name] = parameter
    return matrices, rest
