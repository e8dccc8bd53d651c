"""Every family on a GPU, against diffusers' own pipeline on the same device."""

import pytest
import torch

from pipelines.load import load_pipeline
from tests.pipelines.serving import alone, ask, difference, entry, serve
from tests.pipelines.test_families import CASES
from tests.pipelines.test_flux import run_flux
from tests.pipelines.tiny import load_tiny

# numpy 2 warns about a call in diffusers' schedulers.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

FAMILIES = {name: case for name, case in CASES.items() if name == case.tiny}
NAMES = ("Flux", "FluxGuidance", *FAMILIES)

REQUESTS = [
    ask("a red cat", seed=1, steps=4, guidance_scale=3.5, negative_prompt="ugly"),
    ask("a blue dog running on a beach", seed=2, steps=3, guidance_scale=5.0),
    ask("a late one", seed=3, steps=3, guidance_scale=2.0, negative_prompt=""),
]
ARRIVALS = {0: REQUESTS[:1], 1: REQUESTS[1:]}


def length_of(name):
    return FAMILIES[name].length if name in FAMILIES else 48


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(tiny_folder, name, dtype, device):
    model = entry(tiny_folder(name), dtype=dtype, max_sequence_length=length_of(name))
    return load_pipeline(model, device)


@pytest.fixture(scope="module")
def reference(tiny_folder, name, dtype, device):
    """diffusers' own picture of a request."""
    pipe = load_tiny(tiny_folder(name), dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    if name in FAMILIES:
        return lambda request: FAMILIES[name].reference(pipe, request)
    return lambda request: run_flux(pipe, request, 48)


def test_a_sample_that_joins_midway_equals_diffusers_picture(pipeline, reference):
    pictures, _ = serve(pipeline, ARRIVALS, largest=4)
    for request in REQUESTS:
        assert reference(request).miss(pictures[request.seed]) <= 1, request


def test_in_a_fixed_bucket_the_rest_of_the_batch_changes_no_bit(pipeline):
    pictures, _ = serve(pipeline, ARRIVALS, largest=4, bucket=4)
    for request in REQUESTS:
        assert torch.equal(pictures[request.seed], alone(pipeline, request, bucket=4))


def test_prompts_and_seeds_change_the_picture(pipeline):
    plain = alone(pipeline, REQUESTS[0])
    assert difference(plain, alone(pipeline, ask(seed=9))) > 1e-2
    assert difference(plain, alone(pipeline, ask("a green house", seed=1))) > 1e-3
