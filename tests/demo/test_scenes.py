"""Scenes, their pictures, their captions and the judge agree."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from PIL import Image

from demo.captions import caption, parse, plain
from demo.judge import judge
from demo.prompts import prompts
from demo.scenes import Scene, pair, random_scene, render, single
from demo.score import ROWS, fresh_scenes
from demo.tokenizers import clip_tokenizer, t5_tokenizer
from demo.train_text import attributes
from demo.vocabulary import HELD_OUT, WORDS

SIZES = [(128, 128), (192, 192), (128, 192), (192, 128)]


def pictured(scene: Scene, size: tuple[int, int] = (128, 128)) -> Image.Image:
    pixels = (render([scene], size)[0] * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def meaning(scene: Scene) -> object:
    """The content of a scene, in whichever order its things are named."""
    things = frozenset((t.color, t.shape, t.column, t.row, t.inset) for t in scene.things)
    return scene.background, things, scene.size_word, scene.place


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.title)
def test_a_rendered_scene_is_judged_right(size, row):
    for scene in fresh_scenes(row, count=8, seed=11):
        assert judge(pictured(scene, size), scene).everything, plain(scene)


@pytest.mark.parametrize(
    ("drawn", "wrong"),
    [
        (single("gray", "red", "heart", None, "left"), "background"),
        (single("blue", "green", "heart", None, "left"), "color"),
        (single("blue", "red", "diamond", None, "left"), "shape"),
        (single("blue", "red", "heart", None, "top"), "position"),
    ],
)
def test_only_the_wrong_attribute_is_judged_wrong(drawn, wrong):
    asked = single("blue", "red", "heart", None, "left")
    verdict = judge(pictured(drawn), asked)
    assert not verdict.everything
    for attribute in ("background", "color", "shape", "position"):
        assert getattr(verdict, attribute) == (attribute != wrong)


def test_swapped_things_are_judged_wrong():
    asked = pair("white", ("red", "circle"), "left of", ("blue", "cross"))
    swapped = pair("white", ("red", "circle"), "right of", ("blue", "cross"))
    verdict = judge(pictured(swapped), asked)
    assert verdict.background and not verdict.color and not verdict.shape


def test_an_empty_picture_has_only_its_background_right():
    asked = single("pink", "black", "ring")
    verdict = judge(pictured(replace(asked, things=())), asked)
    assert verdict.background
    assert not (verdict.color or verdict.shape or verdict.position)


def test_every_caption_is_parsed():
    rng = random.Random(3)
    for _ in range(500):
        scene = random_scene(rng, "any")
        assert meaning(parse(plain(scene))) == meaning(scene)
        assert meaning(parse(caption(rng, scene))) == meaning(scene)


@pytest.mark.parametrize("sentence", ["", "a nice day", "a red circle and a blue star"])
def test_a_sentence_without_a_scene_is_refused(sentence):
    with pytest.raises(ValueError, match="expected one thing, or two"):
        parse(sentence)


def test_training_never_sees_a_held_out_pair():
    rng = random.Random(4)
    for _ in range(2000):
        scene = parse(caption(rng, random_scene(rng)))
        assert not HELD_OUT & {(thing.color, thing.shape) for thing in scene.things}
    for row in ROWS:
        for scene in fresh_scenes(row, 50, 0):
            held_out = {(thing.color, thing.shape) in HELD_OUT for thing in scene.things}
            assert held_out == {row.pairs == "held-out"}


def test_the_answers_name_the_upper_or_left_thing_first():
    below = attributes(pair("white", ("red", "star"), "below", ("blue", "cross")))
    assert below == attributes(pair("white", ("blue", "cross"), "above", ("red", "star")))
    assert below != attributes(pair("white", ("red", "star"), "above", ("blue", "cross")))


def test_each_known_word_is_one_token():
    for tokenizer in (clip_tokenizer(), t5_tokenizer()):
        assert [word for word in WORDS if len(tokenizer.tokenize(word)) != 1] == []


def test_the_example_prompts_are_a_hundred_scenes():
    from pathlib import Path

    import demo

    shipped = (Path(demo.__file__).parent / "prompts.txt").read_text().splitlines()
    assert shipped == prompts()
    assert len(set(shipped)) == 100
    assert all(parse(line) for line in shipped)
