"""Transformer training: flow matching over all resolutions, with both text encoders.

It keeps a running average of the weights; that average is scored and shipped.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from demo import transformer as denoiser
from demo.data import Examples, Resolution
from demo.muon import Muon, matrices_and_rest
from demo.progress import Log, Smoothed, remaining_steps, warm_flat_cosine
from demo.text import TextEncoders, Tokens, keep_pads_apart, tokenize

STEPS: Final = 6400
RATE: Final = 2.5e-3
PACES: Final = {"transformer": 1.0, "text_encoder": 0.3, "text_encoder_2": 0.5}
APART: Final = "norm|embed|shared|relative|^proj_out"
AVERAGE: Final = 0.998
CAPTION_DROP: Final = 0.1
LOG_EVERY: Final = 50
SCORE_EVERY: Final = 1000


class Average:
    """The exponential average of the weights, which can replace them for a while."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = weights
        self.averages = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        keep = min(AVERAGE, (step + 1) / (step + 20))
        torch._foreach_lerp_(self.averages, [w.detach() for w in self.weights], 1 - keep)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The modules hold the averages within this context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def settle(self) -> None:
        """Replace the weights by the averages permanently."""
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(self.weights, self.averages, strict=True):
            trained = weight.clone()
            weight.copy_(average)
            average.copy_(trained)

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self.averages}

    def load_state_dict(self, state: Any, /) -> None:
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)


@dataclass(frozen=True)
class Model:
    """The modules that are trained together."""

    transformer: Any
    text: TextEncoders

    @property
    def modules(self) -> dict[str, Any]:
        return {
            "transformer": self.transformer,
            "text_encoder": self.text.text_encoder,
            "text_encoder_2": self.text.text_encoder_2,
        }


def noise_levels(count: int) -> tuple[Tensor, Tensor]:
    """(levels from 0 to 1, which of them are of the noisy kind), each (count,).

    Half are logit-normal. The other half are close to 1, because a flat background
    shows its colour even under heavy noise: only at these levels does the text decide.
    """
    even = (torch.randperm(count) + torch.rand(count)) / count
    normal = math.sqrt(2) * torch.erfinv((2 * even - 1).clamp(-0.9999, 0.9999))
    noisy = torch.arange(count) % 2 == 0
    high = 1 - 0.2 * torch.rand(count) ** 1.5
    return torch.where(noisy, high, torch.sigmoid(0.3 + normal)), noisy


def resolution_for(step: int, resolutions: list[Resolution]) -> Resolution:
    """The resolution of a step's batch, drawn by the resolutions' shares."""
    bounds = list(itertools.accumulate(resolution.share for resolution in resolutions))
    draw = random.Random(f"shelf {step}").random() * bounds[-1]
    return resolutions[bisect.bisect_right(bounds, draw)]


def _optimiser(model: Model) -> Muon:
    groups = []
    for name, module in model.modules.items():
        matrices, rest = matrices_and_rest(module, APART)
        decay = 0.02 if name == "transformer" else 0.0
        groups += [
            {
                "params": list(matrices.values()),
                "orthogonal": True,
                "half": True,
                "weight_decay": decay,
                "pace": PACES[name],
            },
            {"params": list(rest.values()), "pace": PACES[name]},
        ]
    return Muon(groups)


def _drop_captions(tokens: Tokens, empty: Tokens) -> Tokens:
    """Replace some sentences by the empty one, for classifier-free guidance."""
    dropped = torch.rand(len(tokens.clip), 1) < CAPTION_DROP
    clip = torch.where(dropped, empty.clip, tokens.clip)
    return Tokens(clip, torch.where(dropped, empty.t5, tokens.t5))


def _errors(
    forward: Callable[..., Any],
    model: Model,
    resolution: Resolution,
    examples: Examples,
    empty: Tokens,
) -> tuple[Tensor, Tensor]:
    """(each example's squared error, which of them are noisy) of a fresh batch."""
    clean, tokens = examples.pick(resolution.batch)
    level, noisy = noise_levels(resolution.batch)
    noise = torch.randn_like(clean)
    mixed = torch.lerp(clean, noise, level[:, None, None])
    tokens = _drop_captions(tokens, empty)
    velocity = denoiser.predict(forward, model.text, mixed, level, tokens, resolution.size)
    return (velocity - (noise - clean)).square().mean((1, 2)), noisy


def train(
    work: Path,
    log: Log,
    text: TextEncoders,
    resolutions: Mapping[Resolution, Examples],
    *,
    steps: int = STEPS,
    score: Callable[[Model], str] | None = None,
    compiled: bool = True,
) -> Model:
    """The model with its averaged weights; resumes from `work/transformer.pt`."""
    torch.manual_seed(0)
    model = Model(denoiser.build(), text)
    forward = torch.compile(model.transformer, dynamic=False) if compiled else model.transformer
    optimiser = _optimiser(model)
    weights = [weight for group in optimiser.param_groups for weight in group["params"]]
    average = Average(weights)
    empty = tokenize(text.tokenizer, text.tokenizer_2, [""])
    losses = {True: Smoothed(), False: Smoothed()}
    parts = {**model.modules, "optimiser": optimiser, "average": average}
    with denoiser.plain_attention(model.transformer, text):
        for step in remaining_steps(steps, work / "transformer.pt", parts, seed=3):
            fall = warm_flat_cosine(step, steps, warm=50, flat=0.2) + 0.01
            for group in optimiser.param_groups:
                group["lr"] = RATE * fall * group["pace"]
            resolution = resolution_for(step, list(resolutions))
            errors, noisy = _errors(forward, model, resolution, resolutions[resolution], empty)
            optimiser.zero_grad()
            errors.mean().backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            keep_pads_apart(text.text_encoder_2)
            average.update(step)
            for kind, loss in losses.items():
                loss.add(errors[noisy == kind].mean().item())
            if (step + 1) % LOG_EVERY == 0:
                figures = f"noisy {losses[True].value:.4f}, other {losses[False].value:.4f}"
                log(f"transformer {step + 1}/{steps} {resolution.name} loss {figures}")
            if score and (step + 1) % SCORE_EVERY == 0:
                with average.in_place():
                    log(f"transformer {step + 1}/{steps} {score(model)}")
    average.settle()
    keep_pads_apart(text.text_encoder_2)
    return model
