"""Score the model's pictures: `python -m demo.score --model demo/model`.

It draws fresh scenes, from seeds that training never uses, has `demo.judge` check
them, and prints a table.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from demo.captions import plain
from demo.judge import Verdict, judge
from demo.scenes import Pairs, Scene, Wants, random_scene


@dataclass(frozen=True)
class Row:
    """A kind of scene that has its own row in the table."""

    title: str
    pairs: Pairs
    wants: Wants


ROWS: Final = (
    Row("one thing, held-out pair", "held-out", "one"),
    Row("one thing, seen pair", "seen", "one"),
    Row("two things, seen pairs", "seen", "two"),
    Row("two things, held-out pairs", "held-out", "two"),
)


@dataclass(frozen=True)
class Drawing:
    """The settings for drawing pictures."""

    size: tuple[int, int] = (128, 128)  # (height, width)
    steps: int = 8
    text_length: int = 77
    guidance: float = 2.5
    batch: int = 16


def fresh_scenes(row: Row, count: int, seed: int) -> list[Scene]:
    """Scenes of one kind, from seeds that training never uses."""
    rng = random.Random(f"score {row.title} {seed}")
    return [random_scene(rng, row.pairs, row.wants) for _ in range(count)]


def draw(pipeline: Any, sentences: Sequence[str], how: Drawing, seed: int = 0) -> list[Image.Image]:
    """A picture for each sentence, each with its own seed."""
    pictures: list[Image.Image] = []
    for start in range(0, len(sentences), how.batch):
        some = list(sentences[start : start + how.batch])
        seeds = [1_000_000 * (seed + 1) + start + index for index in range(len(some))]
        pictures += pipeline(
            some,
            negative_prompt=[""] * len(some),
            true_cfg_scale=how.guidance,
            num_inference_steps=how.steps,
            height=how.size[0],
            width=how.size[1],
            max_sequence_length=how.text_length,
            generator=[torch.Generator().manual_seed(number) for number in seeds],
        ).images
    return pictures


def verdicts(pipeline: Any, row: Row, count: int, seed: int, how: Drawing) -> list[Verdict]:
    """Draw and judge `count` fresh scenes of one kind."""
    scenes = fresh_scenes(row, count, seed)
    pictures = draw(pipeline, [plain(scene) for scene in scenes], how, seed)
    return [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]


def shares(found: Sequence[Verdict]) -> dict[str, float]:
    """Percentage of pictures with each attribute right, and with all of them right."""
    names = [field.name for field in fields(Verdict)] + ["everything"]
    return {name: 100 * float(np.mean([getattr(v, name) for v in found])) for name in names}


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score the bundled model.")
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--size", default="128x128", help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--text-length", type=int, default=77)
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--count", type=int, default=64, help="pictures for each row and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args()


def main() -> None:
    arguments = _parse_arguments()
    height, width = (int(length) for length in arguments.size.split("x"))
    how = Drawing((height, width), arguments.steps, arguments.text_length, arguments.guidance)
    pipeline = DiffusionPipeline.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    print(f"{arguments.model}: {arguments.size}, {how.steps} steps, {arguments.dtype}, ", end="")
    print(f"text length {how.text_length}, guidance {how.guidance}, seeds {arguments.seeds}")
    print(f"{'':28}{'count':>7}{'backgr.':>9}{'colour':>9}{'shape':>9}{'place':>9}{'all':>9}")
    start = time.monotonic()
    for row in ROWS:
        judged = [
            verdict
            for seed in arguments.seeds
            for verdict in verdicts(pipeline, row, arguments.count, seed, how)
        ]
        cells = "".join(f"{share:8.1f}%" for share in shares(judged).values())
        print(f"{row.title:28}{len(judged):7}{cells}", flush=True)
    drawn = len(ROWS) * len(arguments.seeds) * arguments.count
    print(f"{(time.monotonic() - start) / drawn:.3f} seconds per picture")


if __name__ == "__main__":
    main()
