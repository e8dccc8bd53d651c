"""Turns events into webhook messages. Reads the store; no HTTP here."""

import json
from collections import OrderedDict
from datetime import UTC, datetime
from typing import Any

from jobs.errors import NotFound
from jobs.job import Job
from jobs.queue.decode import Event
from jobs.queue.store import Store
from service.read.views import Links, image_item, job_summary
from service.webhooks.outbox import Message

_NAMES = {
    "succeeded": "job.succeeded",
    "failed": "job.failed",
    "cancelled": "job.cancelled",
    "image": "image.succeeded",
    "image_failed": "image.failed",
}
_REMEMBERED = 10_000
"""Number of jobs whose webhook, or lack of one, is cached."""


class Notices:
    """Turns events into messages for the jobs that have a webhook."""

    def __init__(self, store: Store, links: Links) -> None:
        self._store = store
        self._links = links
        self._hooks: OrderedDict[str, dict[str, Any] | None] = OrderedDict()

    def of(self, event: Event) -> Message | None:
        """The message for an event, if its job wants one. Its id is derived from the event's."""
        name = _NAMES.get(event.type)
        if name is None:
            return None
        hook = self._hook(event.job_id)
        if hook is None or name not in hook["events"]:
            return None
        try:
            job = self._store.job(event.job_id, None)
            data = self._data(event, job)
        except NotFound:
            return None
        when = int(event.id.partition("-")[0]) / 1000
        stamp = datetime.fromtimestamp(when, UTC).isoformat()
        body = json.dumps({"type": name, "timestamp": stamp, "data": data})
        return Message(
            f"msg_{event.id}", hook["url"], body, when, 0, when, job.tenant, job.id, name
        )

    def _data(self, event: Event, job: Job) -> dict[str, Any]:
        if event.index is None:
            return job_summary(job, self._links).model_dump(mode="json")
        image = self._store.image(event.job_id, event.index)
        item = image_item(event.job_id, image, self._links).model_dump(mode="json")
        return {"job": event.job_id, "metadata": job.metadata, **item}

    def _hook(self, job_id: str) -> dict[str, Any] | None:
        if job_id not in self._hooks:
            try:
                self._hooks[job_id] = self._store.spec(job_id).get("webhook")
            except NotFound:
                return None
            if len(self._hooks) > _REMEMBERED:
                self._hooks.popitem(last=False)
        return self._hooks[job_id]
