"""Prompt lengths in the text encoder's tokens: the limit, and counting.

Only tokenizers are used here, not the encoders.
"""

import copy
from collections.abc import Callable
from functools import lru_cache
from threading import Lock
from typing import Any

from tokenizers import Tokenizer

from jobs.errors import ConfigurationError
from pipelines.seam import PromptForm

_PROBE = "  A probe\nfor the TEMPLATE  "
"""A text that no template contains, with what one might change: whitespace and capitals."""


def sequence_length(asked: int | None, default: int, largest: int) -> int:
    """Tokens that prompts are padded or truncated to: the catalog's value or the family's default.

    Raises ConfigurationError if the catalog's value is outside 1..`largest`.
    """
    if asked is None:
        return default
    if not 1 <= asked <= largest:
        raise ConfigurationError(f"max_sequence_length must be 1 to {largest}, not {asked}")
    return asked


def chat_form(chat: Callable[[str], str]) -> PromptForm | None:
    """The form of a chat template that only adds fixed text before and after; None for others."""
    before, probe, after = chat(_PROBE).partition(_PROBE)
    return PromptForm(before, after) if probe else None


class TokenCounter:
    """Counts a text's tokens, including special ones. Thread-safe.

    It works on a copy of the tokenizer, because padding and truncation are part of a tokenizer's
    state and would leak between threads. `prepare` is applied to a text before it's tokenized, as
    the model does.
    """

    def __init__(self, tokenizer: Any, prepare: Callable[[str], str] = str) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._prepare = prepare
        self._lock = Lock()
        self._count = lru_cache(maxsize=4096)(self._tokenize)

    def __call__(self, text: str) -> int:
        """Tokens of `text` without truncation."""
        return self._count(text)

    def to_json(self) -> str | None:
        """The tokenizer's own serialization, without truncation and padding.

        It doesn't include `prepare`. None for a tokenizer implemented in Python, and for one that
        splits special tokens, because the serialization loses that setting.
        """
        tokenizer = self._tokenizer
        if not getattr(tokenizer, "is_fast", False) or tokenizer.split_special_tokens:
            return None
        with self._lock:
            copied = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        copied.no_truncation()
        copied.no_padding()
        return str(copied.to_str())

    def _tokenize(self, text: str) -> int:
        with self._lock:
            return len(self._tokenizer(self._prepare(text)).input_ids)
