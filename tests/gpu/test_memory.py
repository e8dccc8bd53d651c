"""A full GPU: steps report it and change nothing, decoding tiles, a split frees memory."""

import gc

import pytest
import torch

from jobs.catalog import Defaults
from jobs.errors import OutOfMemory
from pipelines.load import load_pipeline
from pipelines.planner.skeleton import STAGES
from pipelines.tiling import tiled
from tests.pipelines.rounding import served_alone
from tests.pipelines.serving import alone, ask, begin, entry

pytestmark = pytest.mark.gpu

MIB = 2**20
LARGE = ask(seed=5, width=1536, height=1536, steps=1, guidance_scale=1.0)


@pytest.fixture
def pipeline(tiny_folder, device):
    return load_pipeline(entry(tiny_folder("Flux"), max_sequence_length=48), device)


class Ballast:
    """Occupies the device's memory."""

    def __init__(self, device):
        self.device, self.held = device, None

    def take_all_but(self, size):
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        reserved = max(0, free - size) // (2 * MIB) * (2 * MIB)
        self.held = torch.empty(reserved, dtype=torch.uint8, device=self.device)

    def drop(self):
        self.held = None
        torch.cuda.empty_cache()


@pytest.fixture
def ballast(device):
    ballast = Ballast(device)
    yield ballast
    ballast.drop()


def peak(device, function):
    """The function's peak memory in bytes, without what was allocated before."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before


def finished(pipeline, request):
    sample = begin(pipeline, request)
    while not sample.done:
        pipeline.step([sample])
    return sample


def test_a_full_device_changes_no_sample_and_stays_usable(pipeline, ballast, device):
    request = ask(seed=1, width=1024, height=1024, steps=2)
    expected = served_alone(pipeline, request)
    assert expected.allowed < 1e-2  # draws the reference while there's memory
    samples = [begin(pipeline, ask(seed=s, width=1024, height=1024, steps=2)) for s in (1, 2, 3)]
    pipeline.step(samples)
    before = [sample.latents.clone() for sample in samples]
    alone_takes = peak(device, lambda: pipeline.step([begin(pipeline, request)]))
    together_take = peak(device, lambda: pipeline.step([begin(pipeline, request)], 32))
    room = 2 * alone_takes + 64 * MIB
    assert together_take > 2 * room
    ballast.take_all_but(room)
    with pytest.raises(OutOfMemory):
        pipeline.step(samples, 32)
    for sample, latents in zip(samples, before, strict=True):
        assert sample.step == 1
        assert torch.equal(sample.latents, latents)
    pipeline.step(samples[:1])  # smaller batches still fit
    ballast.drop()
    pipeline.step(samples[1:], 32)
    assert all(sample.done for sample in samples)
    assert expected.miss(pipeline.decode(samples[:1])[0]) <= 1


def test_an_image_that_does_not_fit_is_decoded_in_tiles(pipeline, ballast, device):
    sample = finished(pipeline, LARGE)
    vae = pipeline.family.pipe.vae

    def in_tiles():
        with tiled(vae):
            return pipeline.family.decode(sample)

    with torch.inference_mode():
        pipeline.decode([sample])  # libraries allocate their workspaces once
        whole = peak(device, lambda: pipeline.family.decode(sample))
        tiles = peak(device, in_tiles)
    assert "tiled" not in sample.extra
    assert tiles < whole / 2
    [expected] = pipeline.decode([sample])
    ballast.take_all_but((whole + tiles) // 2)
    [pixels] = pipeline.decode([sample])
    assert sample.extra["tiled"]
    assert pixels.shape == expected.shape
    assert (pixels - expected).abs().mean() < 0.1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_split_frees_each_stages_memory(tiny_folder, device):
    fields = {"max_sequence_length": 48, "defaults": Defaults(64, 64, 2, 3.5)}
    plain = served_alone(load_pipeline(entry(tiny_folder("SD3"), **fields), device), ask(steps=2))
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    model = entry(tiny_folder("SD3"), placement="split", unload=True, devices=(device,), **fields)
    split = load_pipeline(model, device)
    assert plain.miss(alone(split, ask(steps=2))) <= 1
    stages = split.loader.plan.stages
    sizes = {stage: sum(s.part.size for s in stages[stage]) for stage in STAGES}
    for stage, size in sizes.items():
        assert split.loader.is_loaded(stage)
        loaded = torch.cuda.memory_allocated(device)
        split.loader.unload(stage)
        assert loaded - torch.cuda.memory_allocated(device) >= size
    assert torch.cuda.memory_allocated(device) - before < min(sizes.values())
    assert plain.miss(alone(split, ask(steps=2))) <= 1
