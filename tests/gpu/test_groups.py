"""Groups of ranks over NCCL on one machine, against diffusers' own pipeline on the CPU."""

import pytest
import torch

from tests.pipelines.placements.launch import run_cases

pytestmark = pytest.mark.gpu

REQUESTS = [
    {"prompt": "a red cat", "seed": 1, "steps": 3, "negative_prompt": "ugly"},
    {"prompt": "a blue dog on a beach", "seed": 2, "steps": 2, "guidance_scale": 7.0},
]
RING = {"ring": 2, "dtype": "bfloat16", "attention_backend": "_native_cudnn"}
CASES = {
    "ulysses": {"ulysses": 2},
    "cfg": {"cfg": 2},
    "tensor": {"tensor": 2},
    "pipelined": {"placement": "pipelined", "stages": 2, "chunks": 2},
    "ring": RING,
}


@pytest.fixture(scope="module")
def leader(tiny_folder, tmp_path_factory):
    """Rank 0's results for all cases."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 CUDA devices, and there is {torch.cuda.device_count()}")
    fields = {"family": "Flux", "folder": str(tiny_folder("Flux")), "requests": REQUESTS}
    cases = [
        {"name": name, "device": "cuda", "entry": degrees, **fields}
        for name, degrees in CASES.items()
    ]
    return run_cases(2, tmp_path_factory.mktemp("two"), cases)[0]


@pytest.mark.parametrize("name", CASES)
def test_two_devices_give_the_same_picture_as_one(leader, name):
    seen = leader[name]
    assert "error" not in seen, seen
    assert max(seen["misses"].values()) <= 1, seen["misses"]
