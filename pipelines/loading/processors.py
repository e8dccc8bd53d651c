"""Replace a processor with its own tokenizer if the pipeline only needs text.

Flux2Pipeline's tokenizer is a processor of text and images, which transformers can only create if
torchvision is installed. Prompts have no images, though, and the tokenizer in the same folder
renders and truncates chats to the same tokens, so torchvision isn't needed.
"""

from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

TEXT_ALONE = ("PixtralProcessor",)
"""Processors of which text pipelines only use `apply_chat_template`."""


def tokenizers_of(
    folder: Path, components: Mapping[str, str], loaded: Collection[str]
) -> dict[str, Any]:
    """The tokenizers that replace such processors, by component name.

    `components` maps each component's name to its class name; those in `loaded` are skipped. Raises
    transformers' own error for a folder that it can't read, and ValueError for a chat template from
    which the processor would produce different tokens.
    """
    return {
        name: _tokenizer(folder / name)
        for name, class_name in components.items()
        if class_name in TEXT_ALONE and name not in loaded
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
    """Whether the template starts a chat with the BOS token; the processor adds it if not."""
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    return tokenizer.bos_token is None or chat.startswith(tokenizer.bos_token)
