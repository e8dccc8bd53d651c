"""Defaults of published models whose entry only has a path: size, steps and guidance."""

import inspect
import io
import json

import pytest
import torch
from PIL import Image

from jobs.catalog import load_catalog
from jobs.defaults import to_publish
from jobs.recipe import Recipe
from jobs.reports import ModelCard
from pipelines.load import load_pipeline, resolve_defaults
from pipelines.loading.checkpoint import find_checkpoint
from pipelines.loading.defaults import own_defaults
from service.submit.schemas import SubmitJob
from service.submit.submission import image_requests
from tests.pipelines.published import PUBLISHED, save_published
from tests.pipelines.serving import begin, entry
from tests.pipelines.tiny import BUILDERS
from workers.pictures import encode

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The configuration file of the unet:FutureWarning"),
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_defaults_of_published_models(tiny_folder, tmp_path, name):
    folder = save_published(name, tiny_folder(PUBLISHED[name].builder), tmp_path / "model")
    model = entry(folder)
    assert own_defaults(model, find_checkpoint(model)) == PUBLISHED[name].expected


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "0.2" not in name])
def test_configs_alone_give_the_same_defaults(tiny_folder, tmp_path, name):
    folder = save_published(name, tiny_folder(PUBLISHED[name].builder), tmp_path / "model")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    model = entry(folder)
    assert own_defaults(model, find_checkpoint(model)) == PUBLISHED[name].expected


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "Sana"])
def test_the_default_size_matches_the_latents(tiny_folder, tiny_pipe, name, monkeypatch):
    """Except Sana's, whose signature has one size for checkpoints of several."""
    model, pipe = entry(tiny_folder(name)), tiny_pipe(name)
    takes = inspect.signature(pipe.prepare_latents)
    exact = {"use_resolution_binning": False} if name == "PixArtSigma" else {}
    drawn = []

    def draw(*arguments, **more):
        bound = takes.bind(*arguments, **more).arguments
        drawn.append((bound["width"], bound["height"]))
        raise InterruptedError

    monkeypatch.setattr(pipe, "prepare_latents", draw)
    with pytest.raises(InterruptedError):
        pipe(prompt="a cat", num_inference_steps=1, **exact)
    own = own_defaults(model, find_checkpoint(model))
    assert drawn == [(own.width, own.height)]


RECIPES = ("FLUX.1-schnell", "Z-Image-Turbo", "stable-diffusion-v1-5", "sdxl-turbo")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_defaults_of_an_entry_with_only_a_path(tiny_folder, tmp_path, name):
    expected = PUBLISHED[name].expected
    save_published(name, tiny_folder(PUBLISHED[name].builder), tmp_path / "model")
    (tmp_path / "models.toml").write_text('[models.m]\npath = "./model"\n')
    written = load_catalog(tmp_path / "models.toml").get("m")
    model = resolve_defaults(written)
    card = to_publish(written, model)
    job = SubmitJob.model_validate({"model": "m", "prompts": ["a red cat"]})
    [request] = image_requests(
        job, written, ModelCard.from_dict(json.loads(json.dumps(card.to_dict())))
    )
    pipeline = load_pipeline(model, "cpu")
    sample = begin(pipeline, request)
    pixels = torch.zeros(3, request.height, request.width)
    if request.steps == 1:  # the others take minutes
        pipeline.step([sample])
        [pixels] = pipeline.decode([sample])
    scheduler = pipeline.card.scheduler
    recipe = Recipe.of(request, model, scheduler=scheduler, bucket=1, tiled=False)
    picture = Image.open(io.BytesIO(encode(pixels, recipe)))
    metadata = json.loads(picture.info["imagemill"])
    assert picture.size == (expected.width, expected.height)
    assert (metadata["width"], metadata["height"]) == picture.size
    assert (metadata["steps"], metadata["guidance_scale"]) == (
        expected.steps,
        expected.guidance_scale,
    )
