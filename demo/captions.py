"""Turn scenes into sentences, and sentences back into scenes.

`caption` varies its words, for training. `plain` always uses the same words. `parse`
reads both.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Final

from demo.scenes import Scene, Thing, pair, single
from demo.vocabulary import (
    COLORS,
    INVERSE,
    OPENINGS,
    PLACE_WORDS,
    RELATION_WORDS,
    SHAPES,
    SIZE_WORDS,
    WORDS,
)

_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def plain(scene: Scene) -> str:
    """The scene as a sentence in standard words."""
    background = f"on {with_article(scene.background)} background"
    first = scene.things[0]
    if scene.relation:
        second = scene.things[1]
        return f"{_named(first)} {scene.relation} {_named(second)} {background}"
    words = [_named(first, scene.size_word)]
    if scene.place:
        words.append(PLACE_WORDS[scene.place][0])
    return " ".join([*words, background])


def caption(rng: random.Random, scene: Scene) -> str:
    """The scene as a random sentence; a few contain a nonsense word to ignore."""
    background = _varied_background(rng, scene.background)
    if scene.relation:
        words = [_varied_pair(rng, scene), background]
    else:
        size = rng.choice(SIZE_WORDS[scene.size_word]) if scene.size_word else None
        words = [_varied_name(rng, scene.things[0], size), background]
        if scene.place:
            last = background and rng.random() < 0.2
            words.insert(2 if last else 1, rng.choice(PLACE_WORDS[scene.place]))
    return _varied_writing(rng, " ".join(part for part in words if part))


def parse(sentence: str) -> Scene:
    """The scene that a sentence describes, with everything exactly in its place.

    Unknown words are ignored. Raises ValueError if the sentence names no thing, more than
    two, or two without a relation.
    """
    spoken = sentence.lower().replace(".", "").split()
    text = " ".join(word for word in spoken if word in WORDS).replace("grey", "gray")
    things: list[tuple[str, str]] = _THING.findall(text)
    named = _BACKGROUND.search(text)
    background = named[1] if named else "white"
    if len(things) == 1:
        size_word = _first_spoken(text, SIZE_WORDS)
        return single(background, *things[0], size_word, _first_spoken(text, PLACE_WORDS))
    relation = _first_spoken(text, RELATION_WORDS)
    if len(things) != 2 or relation is None:
        raise ValueError(f"expected one thing, or two in a relation: {sentence!r}")
    return pair(background, things[0], relation, things[1])


_ANY_COLOR: Final = "|".join(COLORS)
_ANY_SHAPE: Final = "|".join(SHAPES)
_THING: Final = re.compile(rf"\b({_ANY_COLOR}) ({_ANY_SHAPE})\b")
_BACKGROUND: Final = re.compile(rf"\b(?:on|with) (?:an? )?({_ANY_COLOR})\b(?! (?:{_ANY_SHAPE}))")


def _first_spoken(text: str, meanings: Mapping[str, Sequence[str]]) -> str | None:
    """The meaning with the longest phrase that the text contains."""
    phrases = [(phrase, meaning) for meaning, some in meanings.items() for phrase in some]
    for phrase, meaning in sorted(phrases, key=lambda both: -len(both[0])):
        if re.search(rf"\b{phrase}\b", text):
            return meaning
    return None


def _named(thing: Thing, size: str | None = None) -> str:
    return with_article(" ".join(filter(None, (size, thing.color, thing.shape))))


def _varied_name(rng: random.Random, thing: Thing, size: str | None = None) -> str:
    named = _named(thing, size)
    return named.split(" ", 1)[1] if rng.random() < 0.08 else named


def _varied_background(rng: random.Random, color: str) -> str:
    draw = rng.random()
    if draw < 0.12:
        return f"on {color}"
    if draw < 0.18:
        return f"with {with_article(color)} background"
    if color == "white" and draw < 0.6:
        return ""
    return f"on {with_article(color)} background"


def _varied_pair(rng: random.Random, scene: Scene) -> str:
    assert scene.relation
    first, second, relation = *scene.things, scene.relation
    if rng.random() < 0.3:
        first, second, relation = second, first, INVERSE[relation]
    between = rng.choice(RELATION_WORDS[relation])
    return f"{_varied_name(rng, first)} {between} {_varied_name(rng, second)}"


def _varied_writing(rng: random.Random, text: str) -> str:
    if rng.random() < 0.08:
        text = f"{rng.choice(OPENINGS)} {text}"
    if rng.random() < 0.06:
        words = text.split()
        nonsense = "".join(rng.choice(_LETTERS) for _ in range(rng.randint(2, 7)))
        words.insert(rng.randrange(len(words) + 1), nonsense)
        text = " ".join(words)
    if rng.random() < 0.08:
        text += "."
    if rng.random() < 0.05:
        text = text.replace("gray", "grey")
    draw = rng.random()
    if draw < 0.2:
        return text[0].upper() + text[1:]
    return text.title() if draw < 0.22 else text
