"""Split placements on pretend devices; `test_split.py` runs this in its own process."""

import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch

from jobs.catalog import Defaults, Model
from jobs.errors import ConfigurationError, OutOfMemory
from jobs.request import ImageRequest
from pipelines.loading.checkpoint import find_checkpoint
from pipelines.placements import residence
from pipelines.placements import split as split_module
from pipelines.placements.split import Split, load_split
from pipelines.placements.stage_loader import StageLoader
from pipelines.planner.memory import CPU, DISK
from pipelines.planner.skeleton import (
    DECODE,
    DENOISE,
    ENCODE,
    STAGES,
    inner_module,
    parts,
    skeletons,
)
from tests.pipelines import pretend
from tests.pipelines.pretend import DEVICES, LEDGER
from tests.pipelines.rounding import Reference
from tests.pipelines.serving import alone, ask, begin, difference, entry
from tests.pipelines.test_families import CASES, Case
from tests.waiting import wait_until

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning",
    "ignore:The given buffer is not writable:UserWarning",
)

pretend.register()
ONE = DEVICES[:1]
REQUEST = ask("a red cat", seed=3, steps=3, negative_prompt="ugly")
SMALL = Defaults(width=64, height=64, steps=3, guidance_scale=3.5)
FLUX = Case(
    "Flux",
    "flux",
    lambda pipe, request: {
        "true_cfg_scale": request.guidance_scale,
        "negative_prompt": request.negative_prompt or "",
    },
    16,
)
FAMILIES = {"Flux": FLUX} | {name: case for name, case in CASES.items() if " " not in name}


LOADED: list[Split] = []


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """Every test starts with empty devices and leaves them empty after unloading."""
    gc.collect()
    gc.freeze()  # so that collections when unloading skip the libraries' objects
    assert not +LEDGER.resident
    yield
    while LOADED:
        split = LOADED.pop()
        for stage in STAGES:
            split.loader.unload(stage)
    split = None
    gc.collect()
    assert not +LEDGER.resident, "bytes left on a device"


@pytest.fixture(scope="module")
def reference(tiny_pipe):
    """diffusers' own image, made alone on the CPU."""

    @cache
    def picture(name: str, request: ImageRequest = REQUEST) -> Reference:
        case = FAMILIES[name]
        return case.reference(tiny_pipe(case.tiny), request)

    return picture


@pytest.fixture
def model(tiny_folder):
    """A split entry of a family's tiny model."""

    def make(name: str, **fields) -> Model:
        case = FAMILIES[name]
        defaults = {"placement": "split", "defaults": SMALL, "max_sequence_length": case.length}
        return entry(tiny_folder(case.tiny), **defaults | {"devices": ONE} | fields)

    return make


@pytest.fixture
def weights_only(monkeypatch):
    """Plan with weights alone, because a tiny model's are negligible next to its activations."""

    def bare(*arguments):
        stages = parts(*arguments)
        return {s: [replace(p, activations=0) for p in ps] for s, ps in stages.items()}

    monkeypatch.setattr(split_module, "parts", bare)


def load(model: Model) -> Split:
    split = load_split(model, find_checkpoint(model), "cpu")
    assert isinstance(split, Split)
    LOADED.append(split)
    return split


def parts_of(model: Model):
    checkpoint = find_checkpoint(model)
    return parts(skeletons(model, checkpoint), checkpoint, model)


def sizes(model: Model) -> tuple[int, int]:
    """Bytes of the denoiser, and of everything else."""
    stages = parts_of(model)
    total = sum(part.size for stage in stages.values() for part in stage)
    denoiser = sum(part.size for part in stages[DENOISE])
    return denoiser, total - denoiser


def places(where: str | dict[str, str]) -> set[str]:
    return {where} if isinstance(where, str) else set(where.values())


# The tiny Sana has only one block.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "Sana"])
def test_denoiser_is_cut_over_two_devices(model, reference, weights_only, name):
    """Each device is a byte too small for the denoiser; the rest of the model waits on the CPU."""
    [denoiser] = parts_of(model(name))[DENOISE]
    needed = denoiser.rest + max(denoiser.blocks.values())
    limits = dict.fromkeys(DEVICES, max(needed, denoiser.size - 1)) | {CPU: "1GB"}
    split = load(model(name, devices=DEVICES, max_memory=limits))
    assert places(split.device_map[denoiser.name]) == set(DEVICES)
    assert reference(name).miss(alone(split, REQUEST)) <= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_take_turns_on_a_device_too_small_for_all(model, reference, name):
    """The ledger checks weights and activations against the limit."""
    stages = parts_of(model(name))
    if name == "Sana":  # the tiny tokenizer splits its instruction into 1,200 tokens
        stages[ENCODE] = [replace(part, activations=2**25) for part in stages[ENCODE]]
    room = max(
        sum(part.size for part in stage) + max(part.activations for part in stage)
        for stage in stages.values()
    )
    split = load(model(name, max_memory={ONE[0]: room}, unload=True))
    with LEDGER.limit({ONE[0]: room}):
        assert reference(name).miss(alone(split, REQUEST)) <= 1
        assert 0 < LEDGER.peak[ONE[0]] <= room
    assert split.loader.loads == Counter(dict.fromkeys(STAGES, 1))
    for stage in STAGES:
        split.loader.unload(stage)
    assert not +LEDGER.resident


@pytest.mark.parametrize(
    ("name", "place"),
    [("Flux", CPU), ("Flux", DISK), ("Flux2Klein", CPU), ("SDXL", DISK), ("ZImage", CPU)],
)
def test_blocks_that_do_not_fit_are_loaded_while_they_run(
    model, reference, weights_only, name, place
):
    """There's only room for the largest block, so each is loaded when it runs and dropped after."""
    stages = parts_of(model(name))
    [denoiser] = stages[DENOISE]
    room = denoiser.rest + max(denoiser.blocks.values())
    encoders = sum(part.rest for part in stages[ENCODE])
    room = max(room, encoders + max(size for p in stages[ENCODE] for size in p.blocks.values()))
    limits = {ONE[0]: room, CPU: 0 if place == DISK else "1GB"}
    split = load(model(name, max_memory=limits, unload=True))
    where = split.device_map[denoiser.name]
    assert places(where) == {ONE[0], place}
    assert reference(name).miss(alone(split, REQUEST)) <= 1
    split.loader.unload(DECODE)
    split.loader.enter(DENOISE)
    resident = sum(size for block, size in denoiser.blocks.items() if where[block] == ONE[0])
    assert LEDGER.resident[ONE[0]] == denoiser.rest + resident


@pytest.mark.parametrize("place", [DEVICES[1], CPU])
def test_cut_denoiser_with_wrong_weights_is_refused(model, weights_only, monkeypatch, place):
    """One block's weights differ from the checkpoint's, on its device or where it waits."""
    hook = residence._add_hooks

    def spoiling(module, spread, waiting, home):
        spoiled = next((name for name, where in spread.where.items() if where == place), None)
        if spoiled is not None:
            tensors = inner_module(module, spoiled).parameters()
            next(tensor for tensor in tensors if tensor.ndim == 2).mul_(1.1)
        hook(module, spread, waiting, home)

    entry = model("Flux", devices=DEVICES if place == DEVICES[1] else ONE)
    [denoiser] = parts_of(entry)[DENOISE]
    needed = denoiser.rest + max(denoiser.blocks.values())
    room = max(needed, denoiser.size - 1) if place == DEVICES[1] else needed
    limits = dict.fromkeys(entry.devices, room) | {CPU: "1GB"}
    entry = replace(entry, max_memory=limits, unload=True)
    load(entry)
    monkeypatch.setattr(residence, "_add_hooks", spoiling)
    monkeypatch.setattr(
        StageLoader, "_fetch_ahead", lambda *_: None
    )  # its thread would outlive the failed load
    with pytest.raises(ConfigurationError, match="the sharded denoiser is wrong: in row 1 of 1"):
        load(entry)


def serve_in_phases(split: Split, requests) -> list[torch.Tensor]:
    """Like the worker with a phased pipeline: encode all, denoise all, decode all."""
    conditionings = split.encode(requests)
    samples = [split.start(r, c) for r, c in zip(requests, conditionings, strict=True)]
    while any(not sample.done for sample in samples):
        for at in range(0, len(samples), 10):
            split.step(samples[at : at + 10])
    return [split.decode([sample])[0] for sample in samples]


def test_backlog_loads_each_stage_once(model, reference, weights_only):
    denoiser, others = sizes(model("Flux"))
    split = load(model("Flux", max_memory={ONE[0]: denoiser}, unload=True))
    assert split.phased
    backlog = [
        replace(REQUEST, prompt=f"cat {n}", seed=n, steps=1, guidance_scale=1.0) for n in range(50)
    ]
    pictures = serve_in_phases(split, backlog)
    assert split.loader.loads == Counter({ENCODE: 1, DENOISE: 1, DECODE: 1})
    assert reference("Flux", backlog[7]).miss(pictures[7]) <= 1

    split.loader.loads.clear()
    serve_in_phases(split, backlog)  # cached prompts need no text encoder
    assert split.loader.loads == Counter({DENOISE: 1, DECODE: 1})
    assert LEDGER.peak[ONE[0]] > 0 and others < denoiser


def test_stages_stay_loaded_if_all_fit(model):
    split = load(model("Flux", unload=True))
    for seed in range(3):
        alone(split, replace(REQUEST, prompt=f"cat {seed}", seed=seed))
    assert split.loader.loads == Counter(dict.fromkeys(STAGES, 1))


def test_next_stage_is_prefetched_if_both_fit(model, weights_only):
    """The denoiser is loaded during encoding if both fit, else only when it's needed."""
    denoiser, others = sizes(model("Flux"))
    for room, fetched in ((denoiser + others, 1), (denoiser, 0)):
        split = load(model("Flux", max_memory={ONE[0]: room}, unload=True))
        split.encode([REQUEST])
        if fetched:
            wait_until(lambda loader=split.loader: loader.loads[DENOISE])
        assert split.loader.loads[DENOISE] == fetched
        assert not split.loader.is_loaded(DENOISE)
        split.step([begin(split, REQUEST)])
        assert split.loader.loads[DENOISE] == 1
        for stage in STAGES:
            split.loader.unload(stage)


def test_copy_on_the_cpu_avoids_reading_the_disk_again(model, reference, monkeypatch, weights_only):
    denoiser, _ = sizes(model("SD3"))
    limits = {ONE[0]: denoiser, CPU: "1GB"}
    split = load(model("SD3", max_memory=limits, unload=True))
    assert reference("SD3").miss(alone(split, REQUEST)) <= 1
    monkeypatch.setattr(
        "pipelines.placements.residence.Residence._read", lambda *_: pytest.fail("read again")
    )
    again = alone(split, replace(REQUEST, prompt="another"))
    assert difference(again, reference("SD3").picture) > 1e-4
    assert split.loader.loads == Counter(dict.fromkeys(STAGES, 2))


def test_out_of_memory_leaves_samples_unchanged(model, reference):
    split = load(model("Flux", unload=True))
    sample = begin(split, REQUEST)
    split.loader.enter(DENOISE)
    split.loader.clear_for(DENOISE)
    too_little = LEDGER.limit({ONE[0]: LEDGER.resident[ONE[0]] + 1000})
    with too_little, pytest.raises(OutOfMemory, match="pretend:0 is out of memory"):
        split.step([sample])
    assert sample.step == 0
    while not sample.done:
        split.step([sample])
    assert reference("Flux").miss(split.decode([sample])[0]) <= 1


def test_other_stages_are_unloaded_when_a_stage_runs_out_of_memory(model, reference):
    alone_first, split = (load(model("Flux", unload=True)) for _ in range(2))
    sample = begin(alone_first, REQUEST)
    alone_first.loader.enter(DENOISE)
    alone_first.loader.clear_for(DENOISE)
    with LEDGER.limit({}):
        alone_first.step([sample])
        enough_alone = LEDGER.peak[ONE[0]]
    alone_first.loader.unload(DENOISE)

    sample = begin(split, REQUEST)
    split.loader.enter(DENOISE)
    with LEDGER.limit({ONE[0]: enough_alone}):  # too little next to the text encoders
        split.step([sample])
    assert not split.loader.is_loaded(ENCODE)
    while not sample.done:
        split.step([sample])
    assert reference("Flux").miss(split.decode([sample])[0]) <= 1


def test_backlog_state_takes_no_device_memory(model):
    split = load(model("SD3", unload=True))
    sample = begin(split, REQUEST)
    split.step([sample])
    held = [sample.latents, *sample.conditioning.tensors.values()]
    assert {t.device.type for t in held} == {"cpu"}
    assert split.preview(sample) is None  # the decoder isn't loaded, and a preview doesn't load it


def test_state_is_on_the_first_device_without_unload(model):
    split = load(model("SD3", devices=DEVICES))
    assert not split.phased
    sample = begin(split, REQUEST)
    split.step([sample])
    held = [sample.latents, *sample.conditioning.tensors.values()]
    assert {str(t.device) for t in held} == {DEVICES[0]}
    assert split.preview(sample).shape == (3, 64, 64)
