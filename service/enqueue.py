"""From a validated body to a queued job: the one way in, whichever API it came by.

Knows the store and the catalog; knows no HTTP but the rule for an Idempotency-Key.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import structlog
from fastapi import Header
from pydantic import WithJsonSchema

from jobs import tracing
from jobs.catalog import Model
from jobs.errors import FieldProblem, InvalidRequest
from jobs.request import ImageRequest
from jobs.views import Submitted
from service.auth import Caller
from service.errors import MalformedHeader, NotReady
from service.mill import Mill
from service.schemas import SubmitJob, Webhook
from service.submission import Card, image_requests, warnings
from service.webhooks.address import is_literal_and_private

log = structlog.get_logger(__name__)

USUAL_PRIORITY = 5
"""What a job gets that asks for none, where its caller may."""

_IDEMPOTENCY_KEY = r"^[!-~]{1,255}$"

IdempotencyKey = Annotated[
    str | None,
    WithJsonSchema({"type": "string", "pattern": _IDEMPOTENCY_KEY}),
    Header(description="Makes a repeated POST return the same job; 1 to 255 visible ASCII."),
]


def enqueue(
    mill: Mill, caller: Caller, body: SubmitJob, idempotency_key: str | None = None
) -> tuple[Submitted, list[str]]:
    """Queue the job that `body` asks for, or find the one that the key made before.

    Returns the job and its warnings. Raises UnknownModel, InvalidRequest, MalformedHeader,
    IdempotencyMismatch, QuotaExceeded, StorageUnavailable, NotReady; nothing is then queued.
    """
    idempotency = None
    if idempotency_key is not None:
        idempotency = (_checked(idempotency_key), _digest(body))
    if body.webhook and not mill.allows_private_webhooks:
        _check_address(body.webhook.url)
    model = mill.catalog.get(body.model)
    card = mill.cards.of(model.name)
    job = submit(
        mill,
        caller,
        _requests(mill, body, model, card),
        priority=body.priority if "priority" in body.model_fields_set else None,
        metadata=body.metadata,
        webhook=body.webhook,
        idempotency=idempotency,
    )
    count = mill.lengths.counter(model.name, card)
    return job, warnings(body, model, card, count)


def _requests(mill: Mill, body: SubmitJob, model: Model, card: Card | None) -> list[ImageRequest]:
    """The job's images; an unknown default says why no worker has read the model."""
    try:
        return image_requests(body, model, card)
    except NotReady as error:
        reason = mill.standstill(model.name)
        raise NotReady(f"{error}: {reason}" if reason else str(error)) from error


def submit(
    mill: Mill,
    caller: Caller,
    requests: Sequence[ImageRequest],
    *,
    priority: int | None,
    metadata: Mapping[str, Any],
    webhook: Webhook | None = None,
    idempotency: tuple[str, str] | None = None,
) -> Submitted:
    """Queue requests of one model as a job. Raises as `enqueue` does.

    Within a span, which the images' spans in their workers will have for their parent.
    """
    priority = priority_of(caller, priority)
    model = requests[0].model
    with tracing.span("submit", model=model, images=len(requests)) as trace:
        made = mill.store.submit(
            requests,
            tenant=caller.tenant,
            priority=priority,
            weight=caller.weight,
            idempotency=idempotency,
            metadata=metadata,
            spec={"webhook": webhook.model_dump() if webhook else None},
            quota=caller.max_unfinished or mill.settings.max_unfinished,
            keep_seconds=mill.settings.keep_seconds,
            max_attempts=mill.settings.max_attempts,
            max_stalls=mill.settings.max_stalls,
            trace=trace,
        )
    log.info(
        "job queued" if made.created else "job found by its key",
        job=made.job_id,
        model=model,
        images=len(requests),
        priority=priority,
    )
    return made


def priority_of(caller: Caller, asked: int | None) -> int:
    """What a job gets whose caller asks for this priority, or for none. Raises InvalidRequest."""
    if asked is None:
        return min(USUAL_PRIORITY, caller.max_priority)
    if asked > caller.max_priority:
        detail = f"must be at most {caller.max_priority} for this key"
        raise InvalidRequest(f"priority {detail}", (FieldProblem("/priority", detail),))
    return asked


def _check_address(url: str) -> None:
    """Refuse at once what would be refused at delivery."""
    if is_literal_and_private(url):
        detail = "must not lead to an address that is not public"
        raise InvalidRequest(f"webhook {detail}", (FieldProblem("/webhook/url", detail),))


def _checked(key: str) -> str:
    if not re.fullmatch(_IDEMPOTENCY_KEY, key):
        raise MalformedHeader("Idempotency-Key must be 1 to 255 visible ASCII characters")
    return key


def _digest(body: SubmitJob) -> str:
    """The same for bodies that ask for the same, however they are written down."""
    canonical = json.dumps(body.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
