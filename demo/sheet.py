"""A sheet of samples: `python -m demo.sheet --model demo/model --out demo/samples.png`.

It draws prompts and arranges the pictures in rows, each above its prompt.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from demo.score import Drawing, draw
from jobs.sheet import Grid

MARGIN: Final = 4
LINE: Final = 11
LINES: Final = 4
LETTER: Final = 5.6
"""Mean width of a letter of Pillow's built-in font, in pixels."""


def sheet(pictures: Sequence[Image.Image], prompts: Sequence[str], columns: int) -> Image.Image:
    """All pictures in rows; they have the same size. Few colours keep the file small."""
    width, height = pictures[0].size
    grid = Grid(len(pictures), columns, width, height + LINES * LINE, MARGIN)
    page = grid.blank()
    pen = ImageDraw.Draw(page)
    for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        x, y = grid.place(index)
        page.paste(picture, (x, y))
        pen.rectangle(
            (x - 1, y - 1, x + picture.width, y + picture.height), outline=(200, 200, 200)
        )
        lines = textwrap.wrap(prompt, int(picture.width / LETTER))[:LINES]
        for number, line in enumerate(lines):
            pen.text((x, y + picture.height + 1 + number * LINE), line, fill="black")
    return page.quantize(256, dither=Image.Dither.NONE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a sheet of samples.")
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--out", type=Path, default=Path("demo/samples.png"))
    parser.add_argument("--prompts", type=Path, default=Path("demo/prompts.txt"))
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--size", default="128x128", help="HEIGHTxWIDTH in pixels")
    arguments = parser.parse_args()
    height, width = (int(length) for length in arguments.size.split("x"))
    pipeline = DiffusionPipeline.from_pretrained(
        arguments.model, dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    prompts = arguments.prompts.read_text().splitlines()[: arguments.count]
    pictures = draw(pipeline, prompts, Drawing(size=(height, width)))
    sheet(pictures, prompts, arguments.columns).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
