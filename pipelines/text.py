"""How long a prompt may be, in the text encoder's tokens, and how long one is.

Knows tokenizers, not the encoders behind them.
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
"""A text that no template holds, with all that one might change: white space and capitals."""


def sequence_length(asked: int | None, default: int, largest: int) -> int:
    """Tokens that prompts are padded or cut to: the catalog's wish, else the family's default.

    Raises ConfigurationError when the wish is outside 1..`largest`.
    """
    if asked is None:
        return default
    if not 1 <= asked <= largest:
        raise ConfigurationError(f"max_sequence_length must be 1 to {largest}, not {asked}")
    return asked


def chat_form(chat: Callable[[str], str]) -> PromptForm | None:
    """The form of a chat template that puts a text unchanged between two fixed ones, else None."""
    before, found, after = chat(_PROBE).partition(_PROBE)
    return PromptForm(before, after) if found else None


class TokenCounter:
    """Counts a text's tokens, special ones included, from any thread.

    On a copy of the tokenizer: padding and truncation are a tokenizer's state, and two threads on
    one get each other's. `prepare` is what the model does to a text before it tokenizes.
    """

    def __init__(self, tokenizer: Any, prepare: Callable[[str], str] = str) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._prepare = prepare
        self._lock = Lock()
        self._count = lru_cache(maxsize=4096)(self._tokenize)

    def __call__(self, text: str) -> int:
        """Tokens of `text` were it never cut."""
        return self._count(text)

    def to_json(self) -> str | None:
        """The tokenizer's own serialisation, cutting and padding nothing.

        What `prepare` does is not in it. None for a tokenizer in Python, and for one that splits
        special tokens, which the serialisation forgets.
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
