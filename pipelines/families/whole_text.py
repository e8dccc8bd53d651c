"""The prompts of whole calls: which of them may share one, and how many tokens are read.

Many pipelines pad the prompts of a call to the longest of them, some without a mask, so that a
prompt's picture depends on its neighbours' lengths. From outside one cannot tell which do. So
prompts share a call when every tokenizer of the pipeline makes equally many tokens of them; then
none is padded for another. Knows tokenizers, and no pipeline by name.
"""

import inspect
from collections.abc import Callable, Hashable
from typing import Any

from diffusers.utils import is_bs4_available, is_ftfy_available

from jobs.request import ImageRequest
from pipelines.seam import PromptForm
from pipelines.text import TokenCounter

_CLIP = "CLIPTokenizer"
"""Beginning of the class names of CLIP's tokenizers: all pipelines pad what they make to 77."""

_PUTS_AROUND = ("system_prompt", "system_message", "instruction", "template")
"""Words in the names of arguments and attributes by which a pipeline adds text to the prompt."""


class PromptTexts:
    """What can be told of a pipeline's prompts from outside.

    `comparable` says whether their lengths can be. `limit` is where its only tokenizer cuts, None
    where there are several or it does not say; `form` is what is done to a prompt before it is
    counted, None where that is unknown. `asked` is the catalog's max_sequence_length.
    """

    def __init__(self, pipe: Any, asked: int | None) -> None:
        tokenizers = _tokenizers(pipe)
        prepare = _preparation(pipe)
        self.comparable = bool(tokenizers)
        self.limit: int | None = None
        self.form: PromptForm | None = None
        self._varying = [TokenCounter(t, prepare) for t in tokenizers if not _is_clip(t)]
        self._only: TokenCounter | None = None
        if len(tokenizers) == 1:
            self.limit = _limit(pipe, tokenizers[0], asked)
        if self.limit is not None and not _adds_text(pipe, tokenizers[0]):
            self._only = TokenCounter(tokenizers[0], prepare)
            self.form = _form(pipe)

    def key(self, request: ImageRequest) -> Hashable:
        """The lengths of the prompt and of the negative one, by every tokenizer."""
        texts = (request.prompt, request.negative_prompt or "")
        return tuple(count(text) for count in self._varying for text in texts)

    def truncated(self, text: str) -> bool:
        """Whether the text is known to be cut."""
        if self.limit is None or self._only is None:
            return False
        return self._only(text) > self.limit

    def tokenizer_json(self) -> str | None:
        """The only tokenizer, where `form` says how prompts are prepared for it."""
        return self._only.to_json() if self._only is not None and self.form else None


def _tokenizers(pipe: Any) -> list[Any]:
    """The pipeline's tokenizers; none where something else reads the prompt too.

    That is a processor with a tokenizer inside, or a model that rewrites prompts with a tokenizer
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
    """Whether it is a tokenizer, or a processor that has one."""
    return hasattr(part, "model_max_length") or hasattr(part, "tokenizer")


def _is_clip(tokenizer: Any) -> bool:
    return type(tokenizer).__name__.startswith(_CLIP)


def _preparation(pipe: Any) -> Callable[[str], str]:
    """What the pipeline does to a caption before it tokenizes: lowers it, takes markup out."""
    if not hasattr(pipe, "_text_preprocessing"):
        return str
    cleans = _cleans(pipe)
    return lambda text: str(pipe._text_preprocessing(text, clean_caption=cleans)[0])


def _cleans(pipe: Any) -> bool:
    parameter = inspect.signature(pipe.__call__).parameters.get("clean_caption")
    return parameter is not None and parameter.default is True


def _limit(pipe: Any, tokenizer: Any, asked: int | None) -> int | None:
    """Tokens that are read of a prompt: what the call is told, else what CLIP has."""
    taken = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    if taken is not None:
        limit = asked or taken.default
    else:
        limit = tokenizer.model_max_length if _is_clip(tokenizer) else None
    return limit if isinstance(limit, int) else None


def _adds_text(pipe: Any, tokenizer: Any) -> bool:
    """Whether the prompt may be put into a longer text, so that its tokens cannot be counted."""
    names = [*inspect.signature(pipe.__call__).parameters, *vars(pipe)]
    told = any(word in name for name in names for word in _PUTS_AROUND)
    return told or getattr(tokenizer, "chat_template", None) is not None


def _form(pipe: Any) -> PromptForm | None:
    """How a prompt is prepared; None where markup is taken out, which the service cannot do."""
    lowers = hasattr(pipe, "_text_preprocessing")
    if lowers and _cleans(pipe) and is_bs4_available() and is_ftfy_available():
        return None
    return PromptForm(lowered=lowers)
