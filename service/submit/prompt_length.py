"""Counts a prompt's tokens as its model does, without torch.

A worker stores its model's tokenizer in the data folder, and publishes in the model's card how it
preprocesses a text. Until then, words are counted instead, because a prompt with more words than
the model's token limit is certain to be cut.
"""

import threading
from collections.abc import Callable
from pathlib import Path

import structlog
from tokenizers import Tokenizer

from jobs.reports import ModelCard

log = structlog.get_logger(__name__)

Count = Callable[[str], int]


class PromptLengths:
    """Token counters by model; `file` returns the path of a model's tokenizer. Thread-safe."""

    def __init__(self, file: Callable[[str], Path]) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._loaded: dict[str, tuple[int, Tokenizer]] = {}

    def counter(self, model: str, card: ModelCard | None) -> Count:
        """A counter to compare a prompt with the card's `max_prompt_tokens`."""
        return self.tokens(model, card) or (lambda text: len(text.split()))

    def tokens(self, model: str, card: ModelCard | None) -> Count | None:
        """A counter of exact tokens; None if the model's tokenizer isn't known."""
        form = card.properties.prompt if card and card.properties else None
        tokenizer = self._tokenizer(model) if form else None
        if tokenizer is None or not form:
            return None

        def count(text: str) -> int:
            return len(tokenizer.encode(form.of(text)).ids) - form.dropped

        return count

    def _tokenizer(self, model: str) -> Tokenizer | None:
        """The model's tokenizer, reloaded when a worker has replaced the file."""
        path = self._file(model)
        with self._lock:
            try:
                written = path.stat().st_mtime_ns
                if self._loaded.get(model, (0, None))[0] != written:
                    self._loaded[model] = (written, Tokenizer.from_file(str(path)))
            except FileNotFoundError:
                return None
            except Exception as error:  # the library raises Exception itself for a bad file
                log.warning("tokenizer unreadable", model=model, reason=str(error))
                return None
            return self._loaded[model][1]
