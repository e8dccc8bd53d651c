"""Publishes a model's card: its defaults at once, the rest once it's known.

All workers of a model publish the same facts. The tokenizer is too large for the queue, so it's
written to the data folder.
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
        self._facts: dict[str, Any] = {}

    def introduce(self) -> Model:
        """Publish the card before the model is loaded, unless it's already published.

        The defaults come first, because until then the service accepts no job that relies on them.
        Returns the entry with these defaults. Raises ModelUnavailable.
        """
        model = resolve_defaults(self._entry)
        self._facts = to_publish(self._entry, model)
        known = self._known()
        if self._entry.unset:
            self._publish(known, {})
        try:
            card, tokenizer = read_card(model)
        except Exception as error:  # loading the model reports whether it's at fault
            log.info("couldn't read the card before loading", model=model.name, reason=str(error))
            return model
        if not asdict(card).items() <= known.items():
            self.publish(card, tokenizer, {})
        return model

    def publish(self, card: Card, tokenizer: str | None, measured: Mapping[str, Any]) -> None:
        """Publish the whole card, and write the tokenizer for the service."""
        if tokenizer is not None:
            self._write_tokenizer(tokenizer)
        self._publish({}, {**asdict(card), **measured})

    def _publish(self, known: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Publish `known` updated with `facts`, unless that changes nothing."""
        facts = {**facts, **self._facts}
        if not facts.items() <= known.items():
            card = {**known, **facts}
            self._patiently(lambda: self._store.publish_card(self._entry.name, card))

    def _known(self) -> dict[str, Any]:
        """The card last published, if it's of the same weights."""
        try:
            known = self._store.card(self._entry.name) or {}
        except StorageUnavailable:
            return {}
        return known if known.get("source") == self._entry.source else {}

    def _write_tokenizer(self, text: str) -> None:
        """Write the tokenizer atomically, because the service may read it at any time."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        partial.write_text(text)
        partial.replace(self._file)
