"""Keyword arguments of `submit` beyond model and prompts, so that type checkers catch typos.

These are the fields of `POST /v1/jobs`. None means unset. The server checks ranges.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Required, TypedDict

from jobs.job import WebhookEvent
from jobs.request import ImageFormat


class Webhook(TypedDict, total=False):
    """Where to send notifications, and for which events; by default only when the job ends."""

    url: Required[str]
    events: Sequence[WebhookEvent]


class JobFields(TypedDict, total=False):
    """Defaults for all prompts, and the job's own fields."""

    negative_prompt: str | None
    seed: int | None
    width: int | None
    height: int | None
    steps: int | None
    guidance_scale: float | None
    n: int | None
    priority: int | None
    format: ImageFormat | None
    reproducible: bool | None
    webhook: Webhook | None
    metadata: Mapping[str, Any] | None
