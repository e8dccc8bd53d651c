"""What workers publish in the queue: each one's report, and the card of each model.

Both are frozen values here and JSON objects in the queue and in the HTTP API. Workers of another
release may write fewer or more keys: a missing key gets its default, an unknown one is ignored.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Histogram:
    """Cumulative, as in Prometheus: (bound, count of values up to it); bound None counts all."""

    buckets: tuple[tuple[float | None, int], ...]
    sum: float

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> Self | None:
        """The inverse of `asdict`; None without values."""
        if not values:
            return None
        return cls(tuple((bound, count) for bound, count in values["buckets"]), values["sum"])


@dataclass(frozen=True, slots=True)
class Buckets:
    """Batch sizes at the default image size.

    Reproducible images get the bits of a batch of `pinned`; `largest` is the largest in use.
    """

    pinned: int
    largest: int


@dataclass(frozen=True, slots=True)
class RankProcess:
    """One process of a group."""

    rank: int
    pid: int
    device: str


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """A worker's state and counters; None is unknown.

    `state` is starting, ready, draining or failed, with the reason in `error`; a ready worker has
    an `error` while it can't deliver. `group` has each rank's process. `started` and `at`, the time
    of the report, are in seconds since the epoch. Counters start at zero with the worker: `steps`
    counts denoising steps per sample, `tokens` image tokens per row and step, `busy_seconds` the
    time with a forward pass running. `held_pixel_steps` is the work left in the images that it
    holds. `pixel_steps_per_second` is its speed with `samples_per_forward` at once. `memory` is in
    bytes, by kind; `prompt_cache` counts prompts by result.
    """

    model: str | None = None
    state: str = "unknown"
    error: str | None = None
    pid: int | None = None
    host: str | None = None
    device: str | None = None
    placement: str | None = None
    ranks: int | None = None
    group: tuple[RankProcess, ...] | None = None
    started: float | None = None
    in_flight: int | None = None
    images_done: int | None = None
    steps_per_second: float | None = None
    forwards: int | None = None
    steps: int | None = None
    at: float | None = None
    busy_seconds: float | None = None
    held_pixel_steps: float | None = None
    memory: Mapping[str, int] | None = None
    pixel_steps_per_second: float | None = None
    samples_per_forward: float | None = None
    tokens: int | None = None
    forward_samples: Histogram | None = None
    forward_seconds: Histogram | None = None
    prompt_cache: Mapping[str, int] | None = None
    buckets: Buckets | None = None

    @property
    def ready(self) -> bool:
        """Whether it can generate images."""
        return self.state == "ready"

    @property
    def failed(self) -> bool:
        """Whether it couldn't start."""
        return self.state == "failed"

    def to_dict(self) -> dict[str, Any]:
        """A JSON object; unknown values are left out, except those of `_NULLABLE`."""
        values = {name: _json(value) for name, value in asdict(self).items()}
        return {
            name: value for name, value in values.items() if value is not None or name in _NULLABLE
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        known = _known(cls, values)
        for name in ("forward_samples", "forward_seconds"):
            known[name] = Histogram.from_dict(known.get(name))
        known["buckets"] = _complete(Buckets, known.get("buckets"))
        if (group := known.get("group")) is not None:
            ranks = (_complete(RankProcess, rank) for rank in group)
            known["group"] = tuple(rank for rank in ranks if rank)
        return cls(**known)


_NULLABLE = (
    "error",
    "steps_per_second",
    "pixel_steps_per_second",
    "samples_per_forward",
    "buckets",
)
"""Fields that are written even if they're None, because clients may rely on the key."""


@dataclass(frozen=True, slots=True)
class PromptForm:
    """How a prompt is prepared before its tokens are counted against `Card.max_prompt_tokens`.

    The tokenizer reads `before` + prompt + `after`. Occurrences of `removed` are deleted from the
    prompt; if `lowered`, the prompt is lowercased and stripped. `dropped` tokens don't count. An
    absent negative prompt is "".
    """

    before: str = ""
    after: str = ""
    lowered: bool = False
    dropped: int = 0
    removed: str = ""

    def of(self, text: str) -> str:
        """The text that the tokenizer reads."""
        if self.removed:
            text = text.replace(self.removed, "")
        return self.before + (text.lower().strip() if self.lowered else text) + self.after


@dataclass(frozen=True, slots=True)
class Card:
    """What a model's configs say about it; the service checks requests against it.

    `multiple`: widths and heights must be multiples of it, in pixels.
    `guidance`: "embedded", "classifier-free", "fixed" (classifier-free at a scale that the pipeline
        sets) or "none".
    `guides_above`: classifier-free guidance runs, and negative prompts are used, if
        `guidance_scale` is above it.
    `joins`: whether a sample may join others between steps.
    `max_prompt_tokens`: where the text encoder truncates; None if unknown.
    `scheduler`: the scheduler's class name, for the recipe.
    `prompt`: how a prompt's tokens are counted with `Pipeline.tokenizer_json`; None if they can't
        be counted from outside.
    `sizes`: the widths and heights that the model has been seen to make, if it changes other sizes
        to these; None if it makes the requested size.
    """

    family: str
    multiple: int
    guidance: str
    joins: bool
    max_prompt_tokens: int | None
    scheduler: str
    prompt: PromptForm | None = None
    guides_above: float = 1.0
    sizes: tuple[tuple[int, int], ...] | None = None


def cut_warning(limit: int, text: str) -> str:
    """What callers are told about a "prompt" or "negative prompt" that's too long for the model."""
    return f"the model reads {limit} tokens of a {text} and cuts the rest"


@dataclass(frozen=True, slots=True)
class Measured:
    """What a worker measured at warm-up.

    `costs` are (image tokens, seconds) of a forward pass, beginning with a batch of one image at
    the default size; `pinned` and `largest` are batch sizes, as in `Buckets`.
    """

    costs: tuple[tuple[int, float], ...]
    pinned: int
    largest: int
    image_tokens_per_pixel: float | None = None


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a model's workers publish about it: one flat JSON object.

    `source` names the weights that it's about. `defaults` are the model's own, for fields that the
    catalog's entry leaves open. `properties` is None until a worker has read the model's configs,
    `measured` until one has loaded it.
    """

    source: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    properties: Card | None = None
    measured: Measured | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        values = {
            **(asdict(self.properties) if self.properties else {}),
            **(asdict(self.measured) if self.measured else {}),
            "source": self.source,
            "defaults": dict(self.defaults),
        }
        return {name: _json(value) for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; incomplete properties or measurements count as unknown."""
        values = dict(values)
        if values.get("prompt"):
            values["prompt"] = PromptForm(**_known(PromptForm, values["prompt"]))
        for name in ("sizes", "costs"):
            if values.get(name) is not None:
                values[name] = tuple((first, second) for first, second in values[name])
        return cls(
            source=values.get("source"),
            defaults=values.get("defaults") or {},
            properties=_complete(Card, values),
            measured=_complete(Measured, values),
        )


def _json(value: Any) -> Any:
    """The value with lists instead of tuples, as a JSON parser would return it."""
    if isinstance(value, dict):
        return {name: _json(item) for name, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, tuple) else value


def _known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that are fields of the dataclass."""
    return {item.name: values[item.name] for item in fields(cls) if item.name in values}


def _complete(cls: type[T], values: Mapping[str, Any] | None) -> T | None:
    """An instance of the dataclass; None if a field without a default is missing."""
    try:
        return cls(**_known(cls, values or {}))
    except TypeError:
        return None
