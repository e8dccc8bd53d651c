"""A processor's own tokenizer in the processor's place, where a pipeline only needs text.

Flux2Pipeline holds a processor of text and images as its tokenizer, which transformers makes only
where torchvision is installed. Prompts are text alone. The tokenizer in the same folder renders and
cuts chats to the same tokens, so torchvision isn't needed.
"""

from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

TEXT_ALONE = ("PixtralProcessor",)
"""Processors that text pipelines only call `apply_chat_template` of."""


def tokenizers_of(
    folder: Path, components: Mapping[str, str], given: Collection[str]
) -> dict[str, Any]:
    """The tokenizers of all components that are such a processor, by the component's name.

    `components` maps a component's name to its class's; those in `given` are left out. Raises what
    transformers raises for a folder that it can't read, and ValueError for a chat template that
    the processor would turn into other tokens.
    """
    return {
        name: _tokenizer(folder / name)
        for name, class_name in components.items()
        if class_name in TEXT_ALONE and name not in given
    }


def _tokenizer(folder: Path) -> Any:
    tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(folder)
    if not _begins_chats(tokenizer):
        raise ValueError(
            f"the chat template in {folder} doesn't begin with the tokenizer's "
            f"{tokenizer.bos_token!r}"
        )
    return tokenizer


def _begins_chats(tokenizer: Any) -> bool:
    """Whether a chat needs no token in front: the processor adds one where the template doesn't."""
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    return tokenizer.bos_token is None or chat.startswith(tokenizer.bos_token)
