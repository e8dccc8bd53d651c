"""The prompts of whole calls: which of them can share a call, and how many tokens are read.

Many pipelines pad the prompts of a call to the longest one, some without a mask, so an image then
depends on the lengths of the other prompts. That can't be seen from outside. So prompts share a
call only if each of the pipeline's tokenizers splits them into the same number of tokens, because
then no prompt is padded for another. Has code for tokenizers, but not for single pipelines.
"""

import inspect
from collections.abc import Callable, Hashable
from typing import Any

from diffusers.utils import is_bs4_available, is_ftfy_available

from jobs.request import ImageRequest
from pipelines.seam import PromptForm
from pipelines.text import TokenCounter

_CLIP = "CLIPTokenizer"
"""Prefix of the class names of CLIP's tokenizers, whose prompts are always padded to 77 tokens."""

_ADDED_TEXT = ("system_prompt", "system_message", "instruction", "template")
"""Words in the names of arguments and attributes with which pipelines add text to the prompt."""


class PromptTexts:
    """What can be found out about a pipeline's prompts from outside.

    `comparable` is whether their lengths can be compared. `limit` is where the only tokenizer cuts;
    None if there are several or the limit is unknown. `form` is how a prompt is prepared before
    it's counted; None if unknown. `max_length` is the catalog's max_sequence_length.
    """

    def __init__(self, pipe: Any, max_length: int | None) -> None:
        tokenizers = _tokenizers(pipe)
        prepare = _preparation(pipe)
        self.comparable = bool(tokenizers)
        self.limit: int | None = None
        self.form: PromptForm | None = None
        self._varying = [TokenCounter(t, prepare) for t in tokenizers if not _is_clip(t)]
        self._only: TokenCounter | None = None
        if len(tokenizers) == 1:
            self.limit = _limit(pipe, tokenizers[0], max_length)
        if self.limit is not None and not _adds_text(pipe, tokenizers[0]):
            self._only = TokenCounter(tokenizers[0], prepare)
            self.form = _form(pipe)

    def key(self, request: ImageRequest) -> Hashable:
        """The lengths of the prompt and the negative prompt, by every tokenizer."""
        texts = (request.prompt, request.negative_prompt or "")
        return tuple(count(text) for count in self._varying for text in texts)

    def truncated(self, text: str) -> bool:
        """Whether the text is known to be cut."""
        if self.limit is None or self._only is None:
            return False
        return self._only(text) > self.limit

    def tokenizer_json(self) -> str | None:
        """The only tokenizer as JSON, if `form` says how prompts are prepared for it."""
        return self._only.to_json() if self._only is not None and self.form else None


def _tokenizers(pipe: Any) -> list[Any]:
    """The pipeline's tokenizers; an empty list if something else reads the prompt too.

    Such as a processor with a tokenizer inside, or a model that rewrites prompts with a tokenizer
    of another name.
    """
    parts = {n: c for n, c in getattr(pipe, "components", {}).items() if c is not None}
    named = {name: part for name, part in parts.items() if name.startswith("tokenizer")}
    others = (part for name, part in parts.items() if name not in named)
    understood = all(_reads_text(part) for part in named.values())
    if not understood or any(_reads_text(part) for part in others):
        return []
    return list(named.values())


def _reads_text(part: Any) -> bool:
    """Whether it's a tokenizer, or a processor that has one."""
    return hasattr(part, "model_max_length") or hasattr(part, "tokenizer")


def _is_clip(tokenizer: Any) -> bool:
    return type(tokenizer).__name__.startswith(_CLIP)


def _preparation(pipe: Any) -> Callable[[str], str]:
    """What the pipeline does before it tokenizes: lowercase the text, remove markup."""
    if not hasattr(pipe, "_text_preprocessing"):
        return str
    cleans = _cleans(pipe)
    return lambda text: str(pipe._text_preprocessing(text, clean_caption=cleans)[0])


def _cleans(pipe: Any) -> bool:
    parameter = inspect.signature(pipe.__call__).parameters.get("clean_caption")
    return parameter is not None and parameter.default is True


def _limit(pipe: Any, tokenizer: Any, max_length: int | None) -> int | None:
    """How many tokens of a prompt are read: the call's max_sequence_length, else CLIP's limit."""
    parameter = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    if parameter is not None:
        limit = max_length or parameter.default
    else:
        limit = tokenizer.model_max_length if _is_clip(tokenizer) else None
    return limit if isinstance(limit, int) else None


def _adds_text(pipe: Any, tokenizer: Any) -> bool:
    """Whether the pipeline may add text to the prompt, so its tokens can't be counted."""
    names = [*inspect.signature(pipe.__call__).parameters, *vars(pipe)]
    has_name = any(word in name for name in names for word in _ADDED_TEXT)
    return has_name or getattr(tokenizer, "chat_template", None) is not None


def _form(pipe: Any) -> PromptForm | None:
    """How a prompt is prepared; None if markup is removed, which the service can't do."""
    lowers = hasattr(pipe, "_text_preprocessing")
    if lowers and _cleans(pipe) and is_bs4_available() and is_ftfy_available():
        return None
    return PromptForm(lowered=lowers)
