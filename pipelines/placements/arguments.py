"""The arguments of a transformer's forward call: by name, and for some of its rows."""

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

from pipelines.placements.transformer_classes import ParallelPlan


def by_name(transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a forward call, by name."""
    return dict(zip(_names(transformer.__class__), args, strict=False)) | dict(kwargs)


def some_rows(
    plan: ParallelPlan, arguments: Mapping[str, Any], rows: Sequence[int]
) -> dict[str, Any]:
    """The arguments of a forward call over these rows only."""
    return {
        name: _select(value, rows) if name in plan.rows else value
        for name, value in arguments.items()
    }


def _select(value: Any, rows: Sequence[int]) -> Any:
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return value[list(rows)]
    return [value[row] for row in rows]


@cache
def _names(transformer: Any) -> tuple[str, ...]:
    """The parameters of a class's forward, without self."""
    return tuple(inspect.signature(transformer.forward).parameters)[1:]
