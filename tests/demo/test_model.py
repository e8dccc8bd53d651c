"""The shipped folder loads like any diffusers folder, is small, and draws its prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline

import demo
from demo.captions import parse
from demo.judge import judge
from demo.score import Drawing, draw

FOLDER = Path(demo.__file__).parent / "model"
PROMPTS = [
    "a red circle on a white background",
    "a large blue heart in the center on a yellow background",
    "a green square at the top left on a black background",
    "an orange star on the right on a blue background",
    "a small purple diamond on a gray background",
    "a pink cross left of a cyan circle on a black background",
    "a white triangle above a red ring on a green background",
    "a yellow heart below a brown square on a cyan background",
]


@pytest.fixture(scope="module")
def pipeline():
    loaded = DiffusionPipeline.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_it_is_a_stock_flux_pipeline_of_at_most_eight_megabytes(pipeline):
    assert type(pipeline) is FluxPipeline
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 8_000_000
    assert not any(path.is_symlink() for path in FOLDER.rglob("*"))


def right_pictures(pipeline, prompts, how):
    pictures = draw(pipeline, prompts, how)
    return [
        judge(picture, parse(prompt)).everything
        for picture, prompt in zip(pictures, prompts, strict=True)
    ]


def test_it_draws_what_the_prompts_say(pipeline):
    assert sum(right_pictures(pipeline, PROMPTS, Drawing())) >= 7


def test_the_longest_text_length_changes_little(pipeline):
    assert sum(right_pictures(pipeline, PROMPTS[:3], Drawing(text_length=512))) >= 2


@pytest.mark.parametrize("size", [(128, 192), (192, 128)])
def test_it_draws_oblong_pictures(pipeline, size):
    assert sum(right_pictures(pipeline, PROMPTS[4:], Drawing(size=size))) >= 3
