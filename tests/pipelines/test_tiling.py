"""An image whose decoding doesn't fit is decoded in tiles before it fails."""

from types import SimpleNamespace

import pytest
import torch
from structlog.testing import capture_logs

from jobs.errors import OutOfMemory
from pipelines.families import make_family
from pipelines.families.whole_call import WholeCall
from pipelines.placements.family_pipeline import FamilyPipeline
from pipelines.tiling import tiled
from tests.pipelines.serving import alone, ask, begin, difference

LARGE = ask(width=128, height=128, steps=1, guidance_scale=1.0)
"""Larger than a tile of the tiny autoencoders, which is 64 pixels."""


@pytest.fixture
def pipeline(tiny_pipe):
    return FamilyPipeline(make_family(tiny_pipe("Flux"), 48))


@pytest.fixture
def vae(pipeline):
    return pipeline.family.pipe.vae


@pytest.fixture
def fits(vae, monkeypatch):
    """A function that sets the largest side of the latents for which the decoder has room."""
    decoder = vae.decoder.forward

    def largest(side: int) -> None:
        def limited(latents, *others):
            if max(latents.shape[-2:]) > side:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
            return decoder(latents, *others)

        monkeypatch.setattr(vae.decoder, "forward", limited)

    return largest


def finished(pipeline, request=LARGE):
    sample = begin(pipeline, request)
    while not sample.done:
        pipeline.step([sample])
    return sample


def test_an_image_that_does_not_fit_is_tiled_and_marked(pipeline, vae, fits):
    whole, small = alone(pipeline, LARGE), ask(steps=1)
    small_alone = alone(pipeline, small)
    with tiled(vae):
        in_tiles = alone(pipeline, LARGE)
    fits(8)
    samples = [finished(pipeline), finished(pipeline, small)]
    with capture_logs() as logs:
        large_pixels, small_pixels = pipeline.decode(samples)
    assert [s.extra.get("tiled", False) for s in samples] == [True, False]
    assert [(line["event"], line["size"]) for line in logs] == [("decoding in tiles", "128x128")]
    assert torch.equal(large_pixels, in_tiles)
    assert difference(large_pixels, whole) > 0
    assert torch.equal(small_pixels, small_alone)
    assert not vae.use_tiling


def test_other_images_are_not_tiled(pipeline, fits):
    before = alone(pipeline, LARGE)
    fits(8)
    pipeline.decode([finished(pipeline)])
    fits(16)
    assert torch.equal(alone(pipeline, LARGE), before)


def test_an_image_that_does_not_fit_in_tiles_fails(pipeline, vae, fits):
    sample = finished(pipeline)
    fits(4)
    with pytest.raises(OutOfMemory, match=r"Tried to allocate 9\.00 GiB") as caught:
        pipeline.decode([sample])
    assert caught.value.__context__ is None
    assert "tiled" not in sample.extra
    assert not vae.use_tiling


@pytest.mark.parametrize("tiles", [True, None])
def test_no_retry_if_tiling_would_not_help(pipeline, vae, fits, monkeypatch, tiles):
    """The autoencoder already tiles, or can't."""
    sample = finished(pipeline)
    fits(4)
    monkeypatch.setattr(vae, "use_tiling", tiles)
    monkeypatch.setattr(vae, "enable_tiling", lambda: pytest.fail("tried again"))
    with pytest.raises(OutOfMemory), capture_logs() as logs:
        pipeline.decode([sample])
    assert logs == []


def test_a_preview_in_tiles_leaves_the_sample_unmarked(pipeline, fits):
    sample = begin(pipeline, ask(width=128, height=128, steps=2, guidance_scale=1.0))
    pipeline.step([sample])
    fits(8)
    assert pipeline.preview(sample).shape == (3, 128, 128)
    assert "tiled" not in sample.extra


def test_a_whole_call_of_one_image_is_tiled_too(tiny_pipe, monkeypatch):
    pipe = tiny_pipe("SD15")
    pipeline = FamilyPipeline(WholeCall(pipe))
    decoder = pipe.vae.decoder.forward

    def limited(latents, *others):
        if latents.shape[-1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decoder(latents, *others)

    monkeypatch.setattr(pipe.vae.decoder, "forward", limited)
    one, two = begin(pipeline, LARGE), begin(pipeline, LARGE)
    with pytest.raises(OutOfMemory):
        pipeline.step([one, two])
    assert (one.done, one.extra) == (False, {})
    pipeline.step([one])
    assert one.done
    assert one.extra["tiled"]


def test_tiles_are_no_larger_than_512_pixels():
    """By default, FLUX.1's autoencoder tiles nothing up to 1024x1024."""
    sizes = {"tile_sample_min_size": 1024, "tile_latent_min_size": 128}
    vae = SimpleNamespace(**sizes, enable_tiling=lambda: None, disable_tiling=lambda: None)
    with tiled(vae):
        assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (512, 64)
    assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (1024, 128)
