"""Responses of a server as frozen values: an image, a job's progress, a model, a worker.

Fields that older servers don't report are None.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from jobs.job import Counts, State
from jobs.request import ImageFormat


@dataclass(frozen=True, slots=True)
class Image:
    """One image of a job as last reported by the server; `step` is measured, not estimated.

    `reproducible` and `format` are as requested. `warnings` are what may surprise about a finished
    image.
    """

    index: int
    prompt: str
    seed: int
    state: State
    step: int
    steps: int
    sha256: str | None
    error: str | None
    reproducible: bool | None = None
    format: ImageFormat | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """Parse an item of a job's `images`."""
        return cls(
            index=raw["index"],
            prompt=raw["prompt"],
            seed=raw["seed"],
            state=State(raw["state"]),
            step=raw["step"],
            steps=raw["steps"],
            sha256=raw.get("sha256"),
            error=raw.get("error"),
            reproducible=raw.get("reproducible"),
            format=raw.get("format"),
            warnings=tuple(raw.get("warnings", ())),
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """A job's progress. `share` is that of all denoising steps, 0..1; `eta_seconds` may be None."""

    state: State
    share: float
    counts: Counts
    queue_position: int | None
    eta_seconds: float | None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """Parse a job, with or without its images."""
        return cls(
            state=State(raw["state"]),
            share=float(raw["progress"]),
            counts=counts_of(raw),
            queue_position=raw.get("queue_position"),
            eta_seconds=raw.get("eta_seconds"),
        )


@dataclass(frozen=True, slots=True)
class Model:
    """A model on the server; `card` holds what a worker measured after loading it."""

    id: str
    dtype: str
    placement: str
    defaults: Mapping[str, Any]
    limits: Mapping[str, Any]
    card: Mapping[str, Any] | None
    ready_workers: int
    queued: int

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """Parse an item of `/v1/models`."""
        return cls(**{name: raw[name] for name in cls.__slots__})


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as last reported; `raw` has the remaining fields.

    `started` and `at`, the time of the report, are in seconds since the epoch.
    """

    id: str
    model: str | None
    state: str
    error: str | None
    device: str | None
    host: str | None
    pid: int | None
    started: float | None
    at: float | None
    in_flight: int | None
    images_done: int | None
    steps_per_second: float | None
    raw: Mapping[str, Any]

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """Parse an item of `/v1/workers`."""
        fields = {name: raw.get(name) for name in cls.__slots__ if name != "raw"}
        return cls(**fields, raw=raw)  # type: ignore[arg-type]  # the server is trusted here


def counts_of(raw: Mapping[str, Any]) -> Counts:
    """The number of a job's images in each state."""
    return Counts(**{name: int(raw["counts"][name]) for name in Counts.__slots__})
