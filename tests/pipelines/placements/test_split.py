"""The split placement: on pretend devices in a process of its own, and on the CPU in this one."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from jobs.catalog import Defaults
from jobs.errors import ConfigurationError
from pipelines.load import load_pipeline
from pipelines.loading.checkpoint import find_checkpoint
from pipelines.placements.split import devices_of, load_split, rooms_of
from pipelines.planner.memory import CPU, DISK
from pipelines.planner.skeleton import DECODE, DENOISE, ENCODE, blocks_of, skeletons, stage_of
from tests.pipelines.serving import alone, ask, begin, entry
from tests.pipelines.test_families import CASES
from tests.waiting import LONG_PATIENCE

SMALL = Defaults(width=64, height=64, steps=3, guidance_scale=3.5)
SPLIT = {"placement": "split", "defaults": SMALL}


def test_on_two_pretend_devices():
    """Runs `pretended.py` separately, because its backend can't be unregistered again."""
    path = Path(__file__).with_name("pretended.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(path)],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LONG_PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("unload", [True, False])
def test_on_a_machine_without_accelerators(tiny_folder, tiny_pipe, unload):
    model = entry(tiny_folder("SD3"), **SPLIT, unload=unload, max_sequence_length=48)
    split = load_split(model, find_checkpoint(model), CPU)
    request = ask(seed=3, steps=3)
    expected = CASES["SD3"].reference(tiny_pipe("SD3"), request)
    assert expected.miss(alone(split, request)) <= 1
    assert split.phased == unload
    assert set(split.device_map.values()) == {CPU}


@pytest.mark.parametrize("name", ["Flux", "Flux2", "Chroma", "SDXL", "QwenImage"])
def test_skeletons_have_the_sizes_of_the_loaded_model(tiny_folder, tiny_pipe, name):
    model = entry(tiny_folder(name))
    pipe = tiny_pipe(name)
    for component, skeleton in skeletons(model, find_checkpoint(model)).items():
        tensors = [*getattr(pipe, component).parameters(), *getattr(pipe, component).buffers()]
        size = sum({id(t): t.numel() * t.element_size() for t in tensors}.values())
        blocks, rest = blocks_of(skeleton)
        assert sum(blocks.values()) + rest == size, component


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"devices": ("cuda:99",)}, "cuda:99 not found on this machine"),
        ({"devices": ("gpu",)}, "invalid device 'gpu'"),
        ({"max_memory": {"7": "1GB"}}, "max_memory: unknown device '7'; expected cpu"),
        ({"max_memory": {CPU: 1000}}, "the model doesn't fit: .* only cpu"),
        ({"attention_backend": "sage"}, "attention_backend 'sage'"),
    ],
)
def test_unsupported_entries_are_refused(tiny_folder, fields, message):
    model = entry(tiny_folder("Flux"), **SPLIT | fields, max_sequence_length=48)
    with pytest.raises(ConfigurationError, match=message):
        load_split(model, find_checkpoint(model), CPU)


def test_whole_call_pipeline_cannot_unload(tmp_path, tiny_pipe):
    pipe = tiny_pipe("SD15")
    pipe.register_to_config(_class_name="StableDiffusionPAGPipeline")
    from diffusers import StableDiffusionPAGPipeline

    StableDiffusionPAGPipeline(**pipe.components, requires_safety_checker=False).save_pretrained(
        tmp_path
    )
    model = entry(tmp_path, **SPLIT, unload=True)
    with pytest.raises(
        ConfigurationError,
        match=r"unload requires .*, but StableDiffusionPAGPipeline is called whole",
    ):
        load_pipeline(model, CPU)


def test_every_load_has_the_attention_backend(tiny_folder):
    model = entry(tiny_folder("Flux"), **SPLIT, attention_backend="native", unload=True)
    split = load_split(model, find_checkpoint(model), CPU)
    split.loader.unload(DENOISE)
    split.step([begin(split, ask(steps=1))])
    processors = split.family.pipe.transformer.attn_processors.values()
    assert {str(p._attention_backend.value) for p in processors} == {"native"}


@pytest.fixture
def in_turn(tiny_folder):
    """A split whose stages would all fit together, and its family."""
    model = entry(tiny_folder("Flux"), **SPLIT, unload=True, max_sequence_length=16)
    split = load_split(model, find_checkpoint(model), CPU)
    return split, split.family._family


def test_first_image_of_a_round_is_decoded_in_tiles_if_needed(in_turn, monkeypatch):
    split, family = in_turn
    decode = family.decode

    def only_in_tiles(sample):
        if not family.pipe.vae.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(sample)

    monkeypatch.setattr(family, "decode", only_in_tiles)
    for seed in (1, 2):
        sample = begin(split, ask(seed=seed, steps=1))
        split.step([sample])
        split.loader.unload(DECODE)  # as at the start of every round on a device too small for all
        split.decode([sample])
        assert sample.extra["tiled"]
        assert not family.pipe.vae.use_tiling


def test_stage_that_ran_out_of_memory_runs_alone_from_then_on(in_turn, monkeypatch):
    split, family = in_turn
    step, failures = family.step, []

    def alone_only(samples, bucket=0):
        if split.loader.is_loaded(ENCODE) or split.loader.is_loaded(DECODE):
            failures.append(samples)
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(samples, bucket)

    monkeypatch.setattr(family, "step", alone_only)
    for seed in range(3):
        alone(split, ask(f"round {seed}", seed=seed, steps=2))
    assert len(failures) == 1
    # One of the decoder's loads was a prefetch while the first step failed.
    assert split.loader.loads == Counter({ENCODE: 3, DENOISE: 1, DECODE: 4})


def test_devices_and_memory_limits_come_from_the_entry(tiny_folder):
    model = entry(tiny_folder("Flux"), **SPLIT, max_memory={"0": "16GB", DISK: "1TB"})
    assert devices_of(model, CPU) == [CPU]
    assert rooms_of(model, [CPU]) == {CPU: 16 * 10**9, DISK: 10**12}


def test_components_belong_to_stages():
    stages = {name: stage_of(name) for name in ("text_encoder_3", "unet", "vae")}
    assert list(stages.values()) == ["encode", "denoise", "decode"]
