"""Text training: both encoders first learn to read a scene's attributes from its caption.

Without this, the transformer's training would also have to train them, and would need several times
as many steps.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.captions import caption
from demo.muon import Muon, matrices_and_rest
from demo.progress import Log, remaining_steps, warm_flat_cosine
from demo.scenes import Pairs, Scene, random_scene
from demo.text import (
    T5_PAD,
    WIDTH,
    TextEncoders,
    Tokens,
    build_text_encoders,
    keep_pads_apart,
    tokenize,
)
from demo.vocabulary import COLORS, PLACES, RELATIONS, SHAPES, SIZE_WORDS

STEPS: Final = 2000
BATCH: Final = 64
CLIP_SHARE: Final = 0.4
"""The share of steps that also train CLIP. T5 needs all steps, because it has to learn which words
belong to which of two things."""

NOTHING: Final = "nothing"
_THING_COLORS: Final = (*COLORS, NOTHING)
_THING_SHAPES: Final = (*SHAPES, NOTHING)
_LAYOUTS: Final = (*PLACES, "side by side", "stacked")
_SIZES: Final = (None, *SIZE_WORDS)
_ANSWERS: Final = (COLORS, COLORS, SHAPES, _THING_COLORS, _THING_SHAPES, _LAYOUTS, _SIZES)
_WIDTHS: Final = [len(answers) for answers in _ANSWERS]


def attributes(scene: Scene) -> list[int]:
    """The right answers: background, colours and shapes of two things, layout, size.

    Two things are ordered from left to right, or from top to bottom.
    """
    things = scene.things
    if scene.relation in ("right of", "below"):
        things = things[::-1]
    kinds = [word for thing in things for word in (thing.color, thing.shape)]
    if scene.relation is None:
        layout = scene.place or "center"
        kinds += [NOTHING, NOTHING]
    else:
        layout = "stacked" if RELATIONS[scene.relation][1] else "side by side"
    words = (scene.background, *kinds, layout, scene.size_word)
    return [answers.index(word) for answers, word in zip(_ANSWERS, words, strict=True)]


class Readers(nn.Module):
    """A linear layer on each encoder, which predicts all attributes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = nn.Linear(WIDTH, sum(_WIDTHS))
        self.t5 = nn.Linear(WIDTH, sum(_WIDTHS))

    def read_clip(self, text: TextEncoders, tokens: Tokens) -> Tensor:
        answers: Tensor = self.clip(text.pooled(tokens.clip))
        return answers

    def read_t5(self, text: TextEncoders, tokens: Tokens) -> Tensor:
        """Read the attributes from the mean over a sentence's words, without padding."""
        longest = int((tokens.t5 != T5_PAD).sum(1).max())
        unpadded = tokens.t5[:, :longest]
        real = (unpadded != T5_PAD).float()[..., None]
        answers: Tensor = self.t5((text.words(unpadded) * real).sum(1) / real.sum(1))
        return answers


def _loss(answers: Tensor, truth: Tensor) -> Tensor:
    parts = torch.split(answers, _WIDTHS, dim=-1)
    return torch.stack([F.cross_entropy(part, truth[:, i]) for i, part in enumerate(parts)]).sum()


def _all_right(answers: Tensor, truth: Tensor) -> float:
    """The share of sentences with every attribute read correctly."""
    parts = torch.split(answers, _WIDTHS, dim=-1)
    right = torch.stack([part.argmax(-1) == truth[:, i] for i, part in enumerate(parts)], 1)
    return right.all(1).float().mean().item()


def _batch(rng: random.Random, text: TextEncoders, scenes: list[Scene]) -> tuple[Tokens, Tensor]:
    sentences = [caption(rng, scene) for scene in scenes]
    tokens = tokenize(text.tokenizer, text.tokenizer_2, sentences)
    return tokens, torch.tensor([attributes(scene) for scene in scenes])


def _optimiser(text: TextEncoders, readers: Readers) -> Muon:
    matrices, rest = list[Tensor](), list[Tensor](readers.parameters())
    relative_biases = list[Tensor]()  # T5's bias by the distance between two words
    for encoder in (text.text_encoder, text.text_encoder_2):
        some, others = matrices_and_rest(encoder, apart="embed|shared|relative")
        matrices += some.values()
        for name, parameter in others.items():
            (relative_biases if "relative" in name else rest).append(parameter)
    return Muon(
        [
            {"params": matrices, "orthogonal": True, "weight_decay": 0.01, "pace": 1.0},
            {"params": rest, "pace": 1.0},
            {"params": relative_biases, "pace": 15.0},
        ]
    )


def train(work: Path, log: Log, steps: int = STEPS) -> TextEncoders:
    """Train the encoders and return them; resumes from `work/text.pt`."""
    torch.manual_seed(0)
    text, readers = build_text_encoders(), Readers()
    optimiser = _optimiser(text, readers)
    parts = {
        "clip": text.text_encoder,
        "t5": text.text_encoder_2,
        "readers": readers,
        "optimiser": optimiser,
    }
    trained = [p for group in optimiser.param_groups[:2] for p in group["params"]]
    for step in remaining_steps(steps, work / "text.pt", parts, seed=2):
        for group in optimiser.param_groups:
            decay = warm_flat_cosine(step, steps, warm=30, flat=0.0)
            group["lr"] = group["pace"] * (3e-3 * decay + 5e-5)
        rng = random.Random(f"text {step}")
        scenes = [
            random_scene(rng, wants="two" if rng.random() < 0.6 else "one") for _ in range(BATCH)
        ]
        tokens, truth = _batch(rng, text, scenes)
        loss = _loss(readers.read_t5(text, tokens), truth)
        if step < CLIP_SHARE * steps:
            loss = loss + _loss(readers.read_clip(text, tokens), truth)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        keep_pads_apart(text.text_encoder_2)
        if (step + 1) % 100 == 0:
            log(f"text {step + 1}/{steps} loss {loss.item():.3f}")
    _report(text, readers, log)
    return text


@torch.no_grad()
def _report(text: TextEncoders, readers: Readers, log: Log) -> None:
    rng = random.Random("text report")
    questions: tuple[Pairs, ...] = ("seen", "held-out")
    for pairs in questions:
        tokens, truth = _batch(rng, text, [random_scene(rng, pairs) for _ in range(512)])
        clip = _all_right(readers.read_clip(text, tokens), truth)
        t5 = _all_right(readers.read_t5(text, tokens), truth)
        log(f"text reads {pairs} captions: clip {clip:.1%}, t5 {t5:.1%}")
