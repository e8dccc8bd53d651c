"""The example prompts: `python -m demo.prompts > demo/prompts.txt`.

Sixteen are chosen to show the whole vocabulary; the rest are random, from a fixed seed.
"""

from __future__ import annotations

import random
from typing import Final

from demo.captions import plain
from demo.scenes import random_scene

COUNT: Final = 100
SHOWPIECES: Final = (
    "a large red circle in the top left corner on a white background",
    "a blue heart left of a purple triangle on a yellow background",
    "a small yellow star in the center on a black background",
    "a green ring above an orange diamond on a white background",
    "a huge pink heart on a purple background",
    "a white cross right of a black square on a red background",
    "a cyan ring in the bottom right corner on a brown background",
    "an orange triangle below a white circle on a blue background",
    "a brown square on the left on a cyan background",
    "a gray star at the top on a pink background",
    "a purple ring over a green cross on an orange background",
    "a big black circle on the right on a gray background",
    "a yellow triangle to the left of a red heart on a green background",
    "a little white star in the bottom left corner on a blue background",
    "a cyan circle under a pink star on a black background",
    "a large orange cross in the middle on a cyan background",
)


def prompts() -> list[str]:
    """All example prompts, in order, without duplicates."""
    rng = random.Random("prompts")
    sentences = dict.fromkeys(SHOWPIECES)
    while len(sentences) < COUNT:
        sentences[plain(random_scene(rng, "any"))] = None
    return list(sentences)


if __name__ == "__main__":
    print("\n".join(prompts()))
