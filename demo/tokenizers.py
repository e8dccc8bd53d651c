"""The two tokenizers, CLIP's and T5's, built so that each known word is one token.

Other words are split into letters.
"""

from __future__ import annotations

from typing import Any, Final

from transformers import CLIPTokenizer, T5TokenizerFast

from demo.vocabulary import WORDS

MODEL_MAX_LENGTH: Final = 77


def _byte_letters() -> list[str]:
    """The 256 characters that represent bytes in byte-level BPE, as in GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in printable] + [chr(256 + count) for count in range(68)]


def clip_tokenizer() -> Any:
    """Byte-level BPE; merges build each word from its first letter.

    The longest words come first, so that a short word's merges don't apply within a longer
    word. "above" comes before all others, because "bottom" would merge its b and o.
    """
    letters = _byte_letters()
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges: dict[tuple[str, str], None] = {}
    for word in sorted(WORDS, key=lambda word: (word != "above", -len(word), word)):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        grown = parts[0]
        for part in parts[1:]:
            merges[grown, part] = None
            grown += part
            vocabulary.setdefault(grown, len(vocabulary))
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=MODEL_MAX_LENGTH)


def t5_tokenizer() -> Any:
    """Unigram: whole words are likely, single letters unlikely."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces += [(letter, -8.0) for letter in f"{letters}{letters.upper()}0123456789.,-'"]
    for word in WORDS:
        pieces += [(f"▁{word}", -4.0), (f"▁{word.capitalize()}", -4.0)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=MODEL_MAX_LENGTH)
