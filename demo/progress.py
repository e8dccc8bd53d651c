"""What all training stages share: schedules, the log, and loops that survive a kill.

A step's randomness depends only on its number, so a run that was stopped and resumed
gives the same model as an uninterrupted run. A stage passes in the parts to save.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import torch

SAVE_SECONDS: Final = 120.0
"""The most work that a kill can cost."""


class Part(Protocol):
    """A module, an optimiser, or anything else with a state to save and restore."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


def warm_flat_cosine(step: int, steps: int, warm: int, flat: float) -> float:
    """The learning rate's factor: up over `warm` steps, flat for a share, then a cosine to 0."""
    share = step / steps
    fall = 1.0 if share < flat else 0.5 + 0.5 * math.cos(math.pi * (share - flat) / (1 - flat))
    return min(1.0, (step + 1) / warm) * fall


def save_atomically(state: Any, path: Path) -> None:
    """Write next to `path`, then rename, so that a reader sees all or nothing."""
    partial = path.with_name(path.name + ".part")
    torch.save(state, partial)
    partial.replace(path)


def remaining_steps(total: int, path: Path, parts: Mapping[str, Part], seed: int) -> Iterator[int]:
    """Yield the numbers of the remaining steps; restore the parts first, save them on the way.

    Torch is seeded for each step. `path` is written every SAVE_SECONDS and at the end.
    """
    done = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        done = int(state["steps"])
        for name, part in parts.items():
            part.load_state_dict(state[name])

    def save(steps: int) -> None:
        states = {name: part.state_dict() for name, part in parts.items()}
        save_atomically({"steps": steps, **states}, path)

    saved = time.monotonic()
    for step in range(done, total):
        torch.manual_seed(seed * 1_000_003 + step)
        yield step
        if time.monotonic() - saved >= SAVE_SECONDS:
            save(step + 1)
            saved = time.monotonic()
    if done < total:
        save(total)


@dataclass
class Log:
    """Writes timed lines to the terminal and to a file."""

    path: Path
    start: float = field(default_factory=time.monotonic)

    def __call__(self, line: str) -> None:
        text = f"{time.strftime('%H:%M:%S')} {time.monotonic() - self.start:7.0f}s  {line}"
        print(text, flush=True)
        with self.path.open("a") as file:
            file.write(text + "\n")


@dataclass
class Smoothed:
    """A running mean of a noisy number."""

    keep: float = 0.98
    value: float | None = None

    def add(self, number: float) -> None:
        before = number if self.value is None else self.value
        self.value = self.keep * before + (1 - self.keep) * number
