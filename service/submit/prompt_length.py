"""How many tokens a prompt has, counted as its model counts, without torch.

A worker leaves the tokenizer of its model in the data folder, and says in the model's card what it
does to a text before it counts. Where there is none yet, words are counted instead: a prompt of
more words than the model reads tokens is certain to be cut.
"""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog
from tokenizers import Tokenizer

log = structlog.get_logger(__name__)

Count = Callable[[str], int]


class PromptLengths:
    """Counters by model; `file` tells where a model's tokenizer is. For any thread."""

    def __init__(self, file: Callable[[str], Path]) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._loaded: dict[str, tuple[int, Tokenizer]] = {}

    def counter(self, model: str, card: Mapping[str, Any] | None) -> Count:
        """Counts a prompt of `model` against its card's `max_prompt_tokens`."""
        return self.tokens(model, card) or (lambda text: len(text.split()))

    def tokens(self, model: str, card: Mapping[str, Any] | None) -> Count | None:
        """Counts the tokens of a prompt; None where the model's tokenizer is not known."""
        form = (card or {}).get("prompt")
        tokenizer = self._tokenizer(model) if form else None
        if tokenizer is None or not form:
            return None

        def count(text: str) -> int:
            removed = form.get("removed")
            read = text.replace(removed, "") if removed else text
            read = read.lower().strip() if form["lowered"] else read
            encoded = tokenizer.encode(form["before"] + read + form["after"])
            return len(encoded.ids) - int(form["dropped"])

        return count

    def _tokenizer(self, model: str) -> Tokenizer | None:
        """The model's tokenizer, read again when a worker has left another."""
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
