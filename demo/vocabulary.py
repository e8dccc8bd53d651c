"""The words that the bundled model understands, and their meanings.

They are colours, shapes, sizes, places and relations. The module also lists the
colour-shape pairs that are held out of training.
"""

from __future__ import annotations

from typing import Final

PALETTE: Final[dict[str, tuple[int, int, int]]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 40),
    "green": (40, 160, 70),
    "cyan": (40, 205, 220),
    "blue": (40, 80, 220),
    "purple": (130, 50, 180),
    "pink": (250, 130, 190),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
    "gray": (130, 130, 130),
    "brown": (130, 80, 40),
}
"""Colour name -> sRGB, 0 to 255."""

COLORS: Final = tuple(PALETTE)
SHAPES: Final = ("circle", "square", "triangle", "star", "ring", "heart", "diamond", "cross")

PLACES: Final[dict[str, tuple[int, int]]] = {
    "center": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
"""Place -> (column, row), each -1, 0 or 1; x grows rightwards, y downwards."""

RELATIONS: Final[dict[str, tuple[int, int]]] = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
"""Relation -> (column, row) of the first thing; the second is opposite."""

INVERSE: Final = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}

SIZE_WORDS: Final = {
    "small": ("small", "tiny", "little"),
    "large": ("large", "big", "huge"),
}

PLACE_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "center": ("in the center", "in the middle", "centered"),
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "on top"),
    "bottom": ("at the bottom", "on the bottom"),
    **{
        corner: (f"in the {corner} corner", f"in the {corner}", f"at the {corner}")
        for corner in ("top left", "top right", "bottom left", "bottom right")
    },
}

RELATION_WORDS: Final = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}

HELD_OUT: Final = frozenset(
    {
        ("red", "star"),
        ("blue", "heart"),
        ("green", "ring"),
        ("yellow", "square"),
        ("purple", "triangle"),
        ("orange", "diamond"),
        ("pink", "circle"),
        ("cyan", "cross"),
        ("white", "heart"),
        ("black", "star"),
        ("gray", "triangle"),
        ("brown", "ring"),
    }
)
"""Colour-shape pairs that no training scene contains; the model is tested on them."""

OPENINGS: Final = ("a picture of", "an image of", "a photo of", "a drawing of")

_PHRASES: Final = (
    *COLORS,
    "grey",
    *SHAPES,
    *OPENINGS,
    "a an on with background",
    *(phrase for some in SIZE_WORDS.values() for phrase in some),
    *(phrase for some in PLACE_WORDS.values() for phrase in some),
    *(phrase for some in RELATION_WORDS.values() for phrase in some),
)
WORDS: Final = tuple(sorted({word for phrase in _PHRASES for word in phrase.split()}))
