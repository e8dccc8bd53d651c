"""What `submit` takes beside model and prompts, so that type checkers see a slip of the pen.

The fields are those of `POST /v1/jobs`; None says the same as leaving out. Ranges are the server's
to judge.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Required, TypedDict

from jobs.request import ImageFormat

WebhookEvent = Literal[
    "job.succeeded", "job.failed", "job.cancelled", "image.succeeded", "image.failed"
]


class Webhook(TypedDict, total=False):
    """Where to report to, and what; without `events`, the job's end."""

    url: Required[str]
    events: Sequence[WebhookEvent]


class JobFields(TypedDict, total=False):
    """Defaults for all prompts, and what is the job's own."""

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
