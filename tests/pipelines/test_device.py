"""Unusable devices are refused, and so is a CPU that wasn't chosen explicitly for a large model."""

import json
import struct

import pytest
import torch

from jobs.errors import ConfigurationError
from pipelines.device import LARGE, check_cuda, check_device, weights_in
from pipelines.load import load_follower, load_pipeline
from pipelines.loading.checkpoint import find_checkpoint
from tests.pipelines.serving import alone, ask, entry

ENOUGH = LARGE // 2 + 1
"""A number of weights that takes more than LARGE bytes in half precision."""


def write_weights(path, count):
    """Write a sparse safetensors file with a header for `count` bfloat16 weights."""
    tensor = {"dtype": "BF16", "shape": [count], "data_offsets": [0, 2 * count]}
    header = json.dumps({"weight": tensor}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * count)


@pytest.fixture
def folder(tmp_path):
    """A pipeline of two components whose weights together are just above the limit."""

    def made(first=ENOUGH // 2, second=ENOUGH - ENOUGH // 2):
        index = {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        for name, count in (("unet", first), ("vae", second)):
            write_weights(tmp_path / name / "diffusion_pytorch_model.safetensors", count)
            (tmp_path / name / "config.json").write_text("{}")
        return tmp_path

    return made


def check(folder, device="cpu", **fields):
    model = entry(folder, **{"dtype": "bfloat16"} | fields)
    check_device(model, find_checkpoint(model), device)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("devices", [(), ("cuda:0",), ("cpu", "cuda:0")])
def test_a_large_model_in_half_precision_does_not_fall_back_to_the_cpu(folder, dtype, devices):
    with pytest.raises(ConfigurationError) as caught:
        check(folder(), dtype=dtype, devices=devices)
    assert str(caught.value) == (
        f"no accelerator is visible, and 1.0 GB of {dtype} weights are too slow on a CPU; "
        'to run them there anyway, set devices = ["cpu"] in the entry'
    )


@pytest.mark.parametrize(
    ("weights", "fields"),
    [
        (ENOUGH, {"devices": ("cpu",)}),
        (ENOUGH, {"devices": ("cpu", "cpu")}),
        (ENOUGH, {"dtype": "float32"}),
        (ENOUGH - 1, {}),
    ],
)
def test_the_cpu_serves_small_models_full_precision_and_explicit_entries(folder, weights, fields):
    check(folder(first=weights, second=0), **fields)


def test_every_ranks_refusal_names_the_entry(folder):
    for load, fields in (
        (load_pipeline, {}),
        (load_pipeline, {"placement": "split"}),
        (load_follower, {"placement": "pipelined", "stages": 2}),
    ):
        with pytest.raises(ConfigurationError, match="model 'tiny': no accelerator is visible"):
            load(entry(folder(), dtype="bfloat16", **fields), "cpu")


def test_half_precision_of_a_small_model_is_served_on_the_cpu(tiny_folder):
    model = entry(tiny_folder("Flux"), dtype="bfloat16", max_sequence_length=48)
    assert torch.isfinite(alone(load_pipeline(model, "cpu"), ask(steps=1))).all()


@pytest.mark.parametrize(
    ("names", "variant", "count"),
    [
        (["model.safetensors"], None, 1),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None, 2),
        (["model.safetensors", "model.fp16.safetensors"], None, 1),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", 1),
        (
            ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"],
            "fp16",
            2,
        ),
        (["model.safetensors"], "fp16", 1),
        (["model.fp16.safetensors"], None, 1),
        ([], None, 0),
    ],
)
def test_each_weight_counts_once(tmp_path, names, variant, count):
    for name in names:
        write_weights(tmp_path / name, 1000)
    assert weights_in(tmp_path, variant) == 1000 * count


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch is built with CUDA")
def test_a_torch_built_without_cuda_is_reported(tiny_folder):
    with pytest.raises(ConfigurationError, match=r"can't use cuda:0: torch .* without CUDA"):
        load_pipeline(entry(tiny_folder("Flux")), "cuda:0")


def test_a_cuda_device_that_torch_does_not_see_is_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_cuda("cuda")
    check_cuda("cuda:1")
    check_cuda("cpu")
    with pytest.raises(ConfigurationError, match="cuda:2 not found: torch sees 2 CUDA devices"):
        check_cuda("cuda:2")
