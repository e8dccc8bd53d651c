"""Publishes a model's card: its defaults at once, the rest once it's known.

All workers of a model publish the same facts. The tokenizer is too large for the queue, so it's
written to the data folder.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import structlog

from jobs.catalog import Model
from jobs.defaults import to_publish
from jobs.errors import StorageUnavailable
from jobs.queue.store import Store
from jobs.reports import Card, Measured, ModelCard
from pipelines.load import read_card, resolve_defaults

log = structlog.get_logger(__name__)


class Cards:
    """Publishes the card of `entry`; `patiently` retries a write while the queue is unavailable."""

    def __init__(
        self,
        entry: Model,
        store: Store,
        tokenizer_file: Path,
        patiently: Callable[[Callable[[], object]], None],
    ) -> None:
        self._entry, self._store, self._file = entry, store, tokenizer_file
        self._patiently = patiently
        self._own = ModelCard(source=entry.source)

    def introduce(self) -> Model:
        """Publish the card before the model is loaded, unless it's already published.

        The defaults come first, because until then the service accepts no job that relies on them.
        Returns the entry with these defaults. Raises ModelUnavailable.
        """
        model = resolve_defaults(self._entry)
        self._own = to_publish(self._entry, model)
        known = self._known()
        card = replace(self._own, properties=known.properties, measured=known.measured)
        if self._entry.unset and card != known:
            self._publish(card)
        try:
            properties, tokenizer = read_card(model)
        except Exception as error:  # loading the model reports whether it's at fault
            log.info("couldn't read the card before loading", model=model.name, reason=str(error))
            return model
        if properties != known.properties:
            self.publish(properties, tokenizer, None)
        return model

    def publish(self, properties: Card, tokenizer: str | None, measured: Measured | None) -> None:
        """Publish the whole card, and write the tokenizer for the service."""
        if tokenizer is not None:
            self._write_tokenizer(tokenizer)
        self._publish(replace(self._own, properties=properties, measured=measured))

    def _publish(self, card: ModelCard) -> None:
        self._patiently(lambda: self._store.publish_card(self._entry.name, card))

    def _known(self) -> ModelCard:
        """The card last published, if it's of the same weights; else an empty one."""
        try:
            known = self._store.card(self._entry.name)
        except StorageUnavailable:
            known = None
        return known if known and known.source == self._entry.source else ModelCard()

    def _write_tokenizer(self, text: str) -> None:
        """Write the tokenizer atomically, because the service may read it at any time."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        partial.write_text(text)
        partial.replace(self._file)
