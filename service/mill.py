"""What the routes work with: the parts that `create_app` was given, in one frozen value."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from jobs.catalog import Catalog
from jobs.images import LocalImages
from jobs.store import Store
from service.documents import Documents
from service.events import EventHub
from service.openai.shelf import FileShelf
from service.prompt_length import PromptLengths
from service.recent import RecentWorkers
from service.settings import ServiceSettings
from service.views import Links


@dataclass(frozen=True, slots=True)
class Mill:
    """The parts of a running service."""

    settings: ServiceSettings
    store: Store
    images: LocalImages
    catalog: Catalog
    hub: EventHub
    files: FileShelf
    batches: Documents
    links: Links
    lengths: PromptLengths
    workers: RecentWorkers
    started: int
    """When the service started, in seconds since the epoch."""


async def mill(request: Request) -> Mill:
    """The parts of the service that got the request; async, so that no thread is asked for them."""
    found: Mill = request.app.state.mill
    return found


TheMill = Annotated[Mill, Depends(mill)]
