"""Turns a validated body into a queued job; all APIs submit through here.

Depends on the store and the catalog. The only HTTP here is the Idempotency-Key header.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import structlog
from fastapi import Header
from pydantic import WithJsonSchema

from jobs.catalog import Model
from jobs.errors import FieldProblem, InvalidRequest
from jobs.queue.decode import Submitted
from jobs.reports import ModelCard
from jobs.request import ImageRequest
from jobs.runtime import tracing
from service.context import ServiceContext
from service.http.auth import Caller
from service.http.errors import MalformedHeader, NotReady
from service.submit.schemas import SubmitJob, Webhook
from service.submit.submission import image_requests, warnings
from service.webhooks.address import is_literal_and_private

log = structlog.get_logger(__name__)

USUAL_PRIORITY = 5
"""Default priority, unless the caller's maximum is lower."""

_IDEMPOTENCY_KEY = r"^[!-~]{1,255}$"

IdempotencyKey = Annotated[
    str | None,
    WithJsonSchema({"type": "string", "pattern": _IDEMPOTENCY_KEY}),
    Header(
        description="Makes a repeated POST return the same job; 1 to 255 visible ASCII characters."
    ),
]


def enqueue(
    context: ServiceContext, caller: Caller, body: SubmitJob, idempotency_key: str | None = None
) -> tuple[Submitted, list[str]]:
    """Queue the job that `body` describes, or find the one that the same key queued before.

    Returns the job and its warnings. Raises UnknownModel, InvalidRequest, MalformedHeader,
    IdempotencyMismatch, QuotaExceeded, StorageUnavailable, NotReady; nothing is queued then.
    """
    idempotency = None
    if idempotency_key is not None:
        idempotency = (checked_key(idempotency_key), _digest(body))
    if body.webhook and not context.allows_private_webhooks:
        _check_address(body.webhook.url)
    model = context.catalog.get(body.model)
    card = context.cards.of(model.name)
    job = submit(
        context,
        caller,
        _requests(context, body, model, card),
        priority=body.priority if "priority" in body.model_fields_set else None,
        metadata=body.metadata,
        webhook=body.webhook,
        idempotency=idempotency,
    )
    count = context.lengths.counter(model.name, card)
    return job, warnings(body, model, card, count)


def _requests(
    context: ServiceContext, body: SubmitJob, model: Model, card: ModelCard | None
) -> list[ImageRequest]:
    """The job's images; an unknown default says why no worker has read the model."""
    try:
        return image_requests(body, model, card)
    except NotReady as error:
        reason = context.standstill(model.name)
        raise NotReady(f"{error}: {reason}" if reason else str(error)) from error


def submit(
    context: ServiceContext,
    caller: Caller,
    requests: Sequence[ImageRequest],
    *,
    priority: int | None,
    metadata: Mapping[str, Any],
    webhook: Webhook | None = None,
    idempotency: tuple[str, str] | None = None,
) -> Submitted:
    """Queue requests of one model as a job. Raises the same errors as `enqueue`.

    Runs in a tracing span, which becomes the parent of the images' spans in their workers.
    """
    priority = priority_of(caller, priority)
    model = requests[0].model
    with tracing.span("submit", model=model, images=len(requests)) as trace:
        submitted = context.store.submit(
            requests,
            tenant=caller.tenant,
            priority=priority,
            weight=caller.weight,
            idempotency=idempotency,
            metadata=metadata,
            spec={"webhook": webhook.model_dump() if webhook else None},
            quota=caller.max_unfinished or context.settings.max_unfinished,
            keep_seconds=context.settings.keep_seconds,
            max_attempts=context.settings.max_attempts,
            max_stalls=context.settings.max_stalls,
            trace=trace,
        )
    log.info(
        "job queued" if submitted.created else "job found by its key",
        job=submitted.job_id,
        model=model,
        images=len(requests),
        priority=priority,
    )
    return submitted


def priority_of(caller: Caller, priority: int | None) -> int:
    """The job's priority for the one in the request, if any. Raises InvalidRequest."""
    if priority is None:
        return min(USUAL_PRIORITY, caller.max_priority)
    if priority > caller.max_priority:
        detail = f"must be at most {caller.max_priority} for this key"
        raise InvalidRequest(f"priority {detail}", (FieldProblem("/priority", detail),))
    return priority


def _check_address(url: str) -> None:
    """Refuse now what delivery would refuse later."""
    if is_literal_and_private(url):
        detail = "must be a public address"
        raise InvalidRequest(f"webhook {detail}", (FieldProblem("/webhook/url", detail),))


def checked_key(key: str) -> str:
    """The Idempotency-Key, if it's valid. Raises MalformedHeader."""
    if not re.fullmatch(_IDEMPOTENCY_KEY, key):
        raise MalformedHeader("Idempotency-Key must be 1 to 255 visible ASCII characters")
    return key


def _digest(body: SubmitJob) -> str:
    """A digest that doesn't depend on how the JSON is formatted."""
    canonical = json.dumps(body.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
