"""What the routes work with: the parts of the service that `create_app` assembles."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from jobs.catalog import Catalog
from jobs.image_store import LocalImages
from jobs.queue.store import Store
from service.documents import Documents
from service.http.auth import Gate
from service.http.signed_urls import UrlSigner
from service.openai.files import FileStore
from service.read.events import EventHub
from service.read.standing import standstill
from service.read.views import Links
from service.read.worker_cache import RecentCards, RecentWorkers
from service.sdapi.sessions import Sessions
from service.settings import ServiceSettings
from service.submit.prompt_length import PromptLengths


@dataclass(frozen=True, slots=True)
class ServiceContext:
    """The parts of a running service."""

    settings: ServiceSettings
    store: Store
    images: LocalImages
    catalog: Catalog
    hub: EventHub
    files: FileStore
    batches: Documents
    links: Links
    lengths: PromptLengths
    workers: RecentWorkers
    cards: RecentCards
    gate: Gate
    signer: UrlSigner
    sessions: Sessions
    started: int
    """When the service started, in seconds since the epoch."""

    def standstill(self, model: str) -> str | None:
        """Why no worker can run a model's jobs; None if one may. Raises StorageUnavailable."""
        workers, patience = self.workers.all(), self.settings.absent_seconds
        return standstill(model, workers, self.workers.absent_seconds(model), patience)

    @property
    def allows_private_webhooks(self) -> bool:
        """Whether webhooks may currently be sent to private addresses.

        If not set, that's only while all callers are on this machine and need no key.
        """
        setting = self.settings.webhook_private
        return self.settings.loopback and self.gate.is_open if setting is None else setting


async def context(request: Request) -> ServiceContext:
    """The context of the service that got the request; async, so it doesn't take up a thread."""
    parts: ServiceContext = request.app.state.context
    return parts


Context = Annotated[ServiceContext, Depends(context)]
