"""A model's card, as its workers publish it: its defaults at once, the rest when they know it.

Each worker of a model publishes the same facts. A tokenizer is too large for the queue: it lies in
the data folder.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog

from jobs.catalog import Model
from jobs.defaults import to_publish
from jobs.errors import StorageUnavailable
from jobs.queue.store import Store
from pipelines.load import read_card, resolve_defaults
from pipelines.seam import Card

log = structlog.get_logger(__name__)


class Cards:
    """Publishes the card of `entry`; `patiently` makes a write outlast an outage of the queue."""

    def __init__(
        self,
        entry: Model,
        store: Store,
        tokenizer_file: Path,
        patiently: Callable[[Callable[[], object]], None],
    ) -> None:
        self._entry, self._store, self._file = entry, store, tokenizer_file
        self._patiently = patiently
        self._facts: dict[str, Any] = {}

    def introduce(self) -> Model:
        """Tell the service what the model is before it is loaded, unless that is known.

        Its defaults come first, since no job that leaves them open is taken until then. Returns
        the entry with these defaults. Raises ModelUnavailable.
        """
        model = resolve_defaults(self._entry)
        self._facts = to_publish(self._entry, model)
        known = self._known()
        if self._entry.unset:
            self._publish(known, {})
        try:
            card, tokenizer = read_card(model)
        except Exception as error:  # loading says whether the model is at fault
            log.info("not known before it is loaded", model=model.name, reason=str(error))
            return model
        if not asdict(card).items() <= known.items():
            self.publish(card, tokenizer, {})
        return model

    def publish(self, card: Card, tokenizer: str | None, measured: Mapping[str, Any]) -> None:
        """Publish all that is known, and leave the tokenizer for the service."""
        if tokenizer is not None:
            self._leave(tokenizer)
        self._publish({}, {**asdict(card), **measured})

    def _publish(self, known: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Publish `facts`, over what is `known`, unless there is nothing new in them."""
        facts = {**facts, **self._facts}
        if not facts.items() <= known.items():
            card = {**known, **facts}
            self._patiently(lambda: self._store.publish_card(self._entry.name, card))

    def _known(self) -> dict[str, Any]:
        """The card of the same weights, as it was last published."""
        try:
            known = self._store.card(self._entry.name) or {}
        except StorageUnavailable:
            return {}
        return known if known.get("source") == self._entry.source else {}

    def _leave(self, text: str) -> None:
        """Put the tokenizer where the service finds it, whole or not at all."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        partial.write_text(text)
        partial.replace(self._file)
