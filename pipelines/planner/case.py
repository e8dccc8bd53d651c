"""One model on some devices, as `imagemill plan` sees it, and catalog entries for them.

Sizes are bytes, counted from configs. Nothing is placed and no weights are loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from jobs.catalog import Model
from jobs.options import LAYOUT, check_options
from pipelines.families import is_stepped
from pipelines.loading.checkpoint import Checkpoint
from pipelines.planner.memory import Part, in_words
from pipelines.planner.skeleton import DECODE, DENOISE, ENCODE, Image


@dataclass(frozen=True, slots=True)
class Option:
    """One way to place the model. `catalog` has the lines for models.toml, None if it doesn't fit.

    `streams` is the bytes of weights, text encoders' included, that cross a link in every pass.
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
            s: max((p.activations for p in parts), default=0) for s, parts in stages.items()
        }
        self.names = [f"cuda:{index}" for index in range(len(devices))]

    def model_for(self, placement: str, **layout: Any) -> Model:
        """The model's entry in another placement, with this layout instead of its own.

        Raises ConfigurationError if the placement doesn't take the entry's options.
        """
        plain: dict[str, Any] = {f.name: f.default for f in fields(Model) if f.name in LAYOUT}
        plain |= {"max_memory": {}, "placement": placement}
        model = replace(self.model, **plain | layout)
        name = self.checkpoint.class_name
        check_options(placement, model.options, name, is_stepped(name))
        return model

    @property
    def alone(self) -> int:
        """Bytes that a device needs to make an image by itself."""
        return self.total + max(self.peak.values())

    def roomiest(self, count: int) -> list[int]:
        """Indices of the `count` largest devices, the largest first."""
        return sorted(range(len(self.sizes)), key=lambda at: -self.sizes[at])[:count]

    def degrees(self) -> list[int]:
        """Group sizes worth listing: powers of two, and all devices."""
        count = len(self.sizes)
        return [n for n in range(2, count + 1) if n in (2, 4, 8) or n == count < 8]

    def has(self) -> str:
        """The devices in words."""
        kinds = {size: self.sizes.count(size) for size in sorted(set(self.sizes), reverse=True)}
        return "available: " + " and ".join(f"{n} x {in_words(size)}" for size, n in kinds.items())

    def entry(self, suffix: str, lines: Sequence[str]) -> str:
        """The table for models.toml, including the fields of the model's own entry."""
        model, defaults = self.model, self.model.defaults
        own = [f"path = {text(model.path)}", f"dtype = {text(model.dtype)}"]
        for field in ("revision", "variant", "attention_backend", "cache", "config"):
            if getattr(model, field):
                own.append(f"{field} = {text(getattr(model, field))}")
        own += [f"{name} = true" for name in ("compile", "cuda_graphs") if getattr(model, name)]
        if model.components:
            own.append(f"components = {table(model.components)}")
        if isinstance(model.quantization, str):
            own.append(f"quantization = {text(model.quantization)}")
        elif model.quantization:
            own.append(f"quantization = {table(model.quantization)}")
        if model.max_sequence_length:
            own.append(f"max_sequence_length = {model.max_sequence_length}")
        own.append(
            f"defaults = {{ width = {defaults.width}, height = {defaults.height}, "
            f"steps = {defaults.steps}, guidance_scale = {defaults.guidance_scale} }}"
        )
        name = f"{model.name}-{suffix}"
        key = text(name) if "." in name else name  # an unquoted dot would nest the table
        return "\n".join([f"[models.{key}]", *own[:2], *lines, *own[2:]])


def text(value: str) -> str:
    """A TOML basic string."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def table(values: Mapping[str, str | None]) -> str:
    """A TOML inline table of strings, with false for None."""
    pairs = (f"{k} = {'false' if value is None else text(value)}" for k, value in values.items())
    return f"{{ {', '.join(pairs)} }}"


def texts(values: Sequence[str]) -> str:
    """A TOML list of strings."""
    return f"[{', '.join(map(text, values))}]"
