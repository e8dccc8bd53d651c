"""What `imagemill plan` knows of one model on some devices, and how it writes an entry for them.

Sizes are bytes, counted from configs; places nothing and loads no weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from jobs.catalog import Model
from pipelines.loading.checkpoint import Checkpoint
from pipelines.planner.memory import Part, in_words
from pipelines.planner.skeleton import DECODE, DENOISE, ENCODE, Image


@dataclass(frozen=True, slots=True)
class Option:
    """One way to place the model. `catalog` are lines for models.toml, None where it cannot be.

    `streams` are bytes of weights, text encoders' too, that come over a link in every pass.
    """

    name: str
    fits: bool
    arithmetic: str
    speed: str = ""
    catalog: str | None = None
    streams: int = 0


class Case:
    """One model on some devices."""

    def __init__(
        self,
        model: Model,
        modules: dict[str, nn.Module],
        stages: dict[str, list[Part]],
        checkpoint: Checkpoint,
        devices: Sequence[int],
        cpu: int,
    ) -> None:
        self.model, self.stages, self.checkpoint = model, stages, checkpoint
        self.sizes, self.cpu = list(devices), cpu
        self.image = Image(modules, checkpoint, model)
        self.denoiser = stages[DENOISE][0]
        self.kind = type(modules[self.denoiser.name]).__name__
        self.module: Any = modules[self.denoiser.name]
        self.others = sum(p.size for s in (ENCODE, DECODE) for p in stages[s])
        self.total = self.denoiser.size + self.others
        self.peak = {
            s: max((p.activations for p in found), default=0) for s, found in stages.items()
        }
        self.names = [f"cuda:{index}" for index in range(len(devices))]

    @property
    def alone(self) -> int:
        """What a device must have to make an image by itself."""
        return self.total + max(self.peak.values())

    def roomiest(self, count: int) -> list[int]:
        """The places of so many devices, the largest first."""
        return sorted(range(len(self.sizes)), key=lambda at: -self.sizes[at])[:count]

    def degrees(self) -> list[int]:
        """Sizes of a group that are worth a line: doubling, and all devices."""
        count = len(self.sizes)
        return [n for n in range(2, count + 1) if n in (2, 4, 8) or n == count < 8]

    def has(self) -> str:
        """The devices in words."""
        kinds = {size: self.sizes.count(size) for size in sorted(set(self.sizes), reverse=True)}
        return "there is " + " and ".join(f"{n} x {in_words(size)}" for size, n in kinds.items())

    def entry(self, suffix: str, lines: Sequence[str]) -> str:
        """The table for models.toml, with what the model's own entry says."""
        model, defaults = self.model, self.model.defaults
        kept = [f"path = {text(model.path)}", f"dtype = {text(model.dtype)}"]
        for field in ("revision", "variant", "attention_backend", "config"):
            if getattr(model, field):
                kept.append(f"{field} = {text(getattr(model, field))}")
        if model.components:
            kept.append(f"components = {table(model.components)}")
        if isinstance(model.quantization, str):
            kept.append(f"quantization = {text(model.quantization)}")
        elif model.quantization:
            kept.append(f"quantization = {table(model.quantization)}")
        if model.max_sequence_length:
            kept.append(f"max_sequence_length = {model.max_sequence_length}")
        kept.append(
            f"defaults = {{ width = {defaults.width}, height = {defaults.height}, "
            f"steps = {defaults.steps}, guidance_scale = {defaults.guidance_scale} }}"
        )
        name = f"{model.name}-{suffix}"
        key = text(name) if "." in name else name  # a dot would make a table within a table
        return "\n".join([f"[models.{key}]", *kept[:2], *lines, *kept[2:]])


def text(value: str) -> str:
    """A TOML basic string."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def table(values: Mapping[str, str | None]) -> str:
    """A TOML inline table of strings; false for None."""
    pairs = (f"{k} = {'false' if value is None else text(value)}" for k, value in values.items())
    return f"{{ {', '.join(pairs)} }}"


def texts(values: Sequence[str]) -> str:
    """A TOML list of strings."""
    return f"[{', '.join(map(text, values))}]"
