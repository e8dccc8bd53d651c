"""How long a prompt may be, in the text encoder's tokens, and whether one was cut.

Knows tokenizers, not the encoders behind them.
"""

from typing import Any

from jobs.errors import ConfigurationError


def sequence_length(asked: int | None, default: int, largest: int) -> int:
    """Tokens that prompts are padded or cut to: the catalog's wish, else the family's default.

    Raises ConfigurationError when the wish is outside 1..`largest`.
    """
    if asked is None:
        return default
    if not 1 <= asked <= largest:
        raise ConfigurationError(f"max_sequence_length must be 1 to {largest}, not {asked}")
    return asked


def is_cut(tokenizer: Any, text: str, limit: int) -> bool:
    """Whether `text` with its special tokens has more than `limit` tokens."""
    return len(tokenizer(text).input_ids) > limit
