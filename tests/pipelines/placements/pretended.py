"""Split placements on pretend devices; `test_split.py` runs this in a process of its own."""

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
from pipelines.placements.stage_loader import Turns
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
    """Every test starts on empty devices, and leaves them empty when all is unloaded."""
    gc.collect()
    gc.freeze()  # what the libraries made need not be looked through at every unloading
    assert not +LEDGER.resident
    yield
    while LOADED:
        split = LOADED.pop()
        for stage in STAGES:
            split.turns.unload(stage)
    split = None
    gc.collect()
    assert not +LEDGER.resident, "bytes left on a device"


@pytest.fixture(scope="module")
def reference(tiny_pipe):
    """diffusers' own picture, on the CPU, alone."""

    @cache
    def picture(name: str, request: ImageRequest = REQUEST) -> Reference:
        case = FAMILIES[name]
        return case.reference(tiny_pipe(case.tiny), request)

    return picture


@pytest.fixture
def model(tiny_folder):
    """A split entry of a family's tiny model."""

    def made(name: str, **fields) -> Model:
        case = FAMILIES[name]
        given = {"placement": "split", "defaults": SMALL, "max_sequence_length": case.length}
        return entry(tiny_folder(case.tiny), **given | {"devices": ONE} | fields)

    return made


@pytest.fixture
def weights_only(monkeypatch):
    """Plan with weights alone: beside a tiny model's, activations are all that counts."""

    def bare(*arguments):
        found = parts(*arguments)
        return {s: [replace(p, activations=0) for p in ps] for s, ps in found.items()}

    monkeypatch.setattr(split_module, "parts", bare)


def load(model: Model) -> Split:
    made = load_split(model, find_checkpoint(model), "cpu")
    assert isinstance(made, Split)
    LOADED.append(made)
    return made


def parts_of(model: Model):
    checkpoint = find_checkpoint(model)
    return parts(skeletons(model, checkpoint), checkpoint, model)


def sizes(model: Model) -> tuple[int, int]:
    """Bytes of the denoiser, and of all the rest."""
    stages = parts_of(model)
    total = sum(part.size for found in stages.values() for part in found)
    denoiser = sum(part.size for part in stages[DENOISE])
    return denoiser, total - denoiser


def places(where: str | dict[str, str]) -> set[str]:
    return {where} if isinstance(where, str) else set(where.values())


# The tiny Sana has but one block.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "Sana"])
def test_cut_over_two_devices(model, reference, weights_only, name):
    """Each a byte too small for the denoiser; what else has no room then waits on the CPU."""
    [denoiser] = parts_of(model(name))[DENOISE]
    needed = denoiser.rest + max(denoiser.blocks.values())
    limits = dict.fromkeys(DEVICES, max(needed, denoiser.size - 1)) | {CPU: "1GB"}
    split = load(model(name, devices=DEVICES, max_memory=limits))
    assert places(split.device_map[denoiser.name]) == set(DEVICES)
    assert reference(name).miss(alone(split, REQUEST)) <= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_in_turn_on_a_device_too_small_for_all(model, reference, name):
    """Within the limit, which the ledger holds against weights and activations."""
    stages = parts_of(model(name))
    if name == "Sana":  # the tiny tokenizer makes 1,200 tokens of its instruction's letters
        stages[ENCODE] = [replace(part, activations=2**25) for part in stages[ENCODE]]
    room = max(
        sum(part.size for part in found) + max(part.activations for part in found)
        for found in stages.values()
    )
    split = load(model(name, max_memory={ONE[0]: room}, unload=True))
    with LEDGER.limit({ONE[0]: room}):
        assert reference(name).miss(alone(split, REQUEST)) <= 1
        assert 0 < LEDGER.peak[ONE[0]] <= room
    assert split.turns.loads == Counter(dict.fromkeys(STAGES, 1))
    for stage in STAGES:
        split.turns.unload(stage)
    assert not +LEDGER.resident


@pytest.mark.parametrize(
    ("name", "place"),
    [("Flux", CPU), ("Flux", DISK), ("Flux2Klein", CPU), ("SDXL", DISK), ("ZImage", CPU)],
)
def test_blocks_wait_outside(model, reference, weights_only, name, place):
    """All but the largest block's room is taken: the blocks come when they run, and go again."""
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
    split.turns.unload(DECODE)
    split.turns.enter(DENOISE)
    kept = sum(size for block, size in denoiser.blocks.items() if where[block] == ONE[0])
    assert LEDGER.resident[ONE[0]] == denoiser.rest + kept


@pytest.mark.parametrize("place", [DEVICES[1], CPU])
def test_a_cut_denoiser_that_computes_something_else_never_serves(
    model, weights_only, monkeypatch, place
):
    """One block's weights are not those of the checkpoint, where it is or where it waits."""
    hook = residence._hook

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
    monkeypatch.setattr(residence, "_hook", spoiling)
    monkeypatch.setattr(Turns, "_fetch_ahead", lambda *_: None)  # none is left to wait for it
    with pytest.raises(ConfigurationError, match="the sharded denoiser is wrong: in row 1 of 1"):
        load(entry)


def serve_in_phases(split: Split, requests) -> list[torch.Tensor]:
    """As the worker does with a phased pipeline: encode all, denoise all, decode all."""
    conditionings = split.encode(requests)
    samples = [split.start(r, c) for r, c in zip(requests, conditionings, strict=True)]
    while any(not sample.done for sample in samples):
        for at in range(0, len(samples), 10):
            split.step(samples[at : at + 10])
    return [split.decode([sample])[0] for sample in samples]


def test_a_backlog_pays_each_load_once(model, reference, weights_only):
    denoiser, others = sizes(model("Flux"))
    split = load(model("Flux", max_memory={ONE[0]: denoiser}, unload=True))
    assert split.phased
    backlog = [
        replace(REQUEST, prompt=f"cat {n}", seed=n, steps=1, guidance_scale=1.0) for n in range(50)
    ]
    pictures = serve_in_phases(split, backlog)
    assert split.turns.loads == Counter({ENCODE: 1, DENOISE: 1, DECODE: 1})
    assert reference("Flux", backlog[7]).miss(pictures[7]) <= 1

    split.turns.loads.clear()
    serve_in_phases(split, backlog)  # prompts that are known need no text encoder
    assert split.turns.loads == Counter({DENOISE: 1, DECODE: 1})
    assert LEDGER.peak[ONE[0]] > 0 and others < denoiser


def test_all_stay_where_all_fit(model):
    split = load(model("Flux", unload=True))
    for seed in range(3):
        alone(split, replace(REQUEST, prompt=f"cat {seed}", seed=seed))
    assert split.turns.loads == Counter(dict.fromkeys(STAGES, 1))


def test_the_next_stage_is_fetched_while_one_runs(model, weights_only):
    """The denoiser arrives during encoding if both fit, and stays out if they do not."""
    denoiser, others = sizes(model("Flux"))
    for room, fetched in ((denoiser + others, 1), (denoiser, 0)):
        split = load(model("Flux", max_memory={ONE[0]: room}, unload=True))
        split.encode([REQUEST])
        if fetched:
            wait_until(lambda turns=split.turns: turns.loads[DENOISE])
        assert split.turns.loads[DENOISE] == fetched
        assert not split.turns.is_loaded(DENOISE)
        split.step([begin(split, REQUEST)])
        assert split.turns.loads[DENOISE] == 1
        for stage in STAGES:
            split.turns.unload(stage)


def test_a_copy_on_the_cpu_spares_the_disk(model, reference, monkeypatch, weights_only):
    denoiser, _ = sizes(model("SD3"))
    limits = {ONE[0]: denoiser, CPU: "1GB"}
    split = load(model("SD3", max_memory=limits, unload=True))
    assert reference("SD3").miss(alone(split, REQUEST)) <= 1
    monkeypatch.setattr(
        "pipelines.placements.residence.Residence._read", lambda *_: pytest.fail("read again")
    )
    again = alone(split, replace(REQUEST, prompt="another"))
    assert difference(again, reference("SD3").picture) > 1e-4
    assert split.turns.loads == Counter(dict.fromkeys(STAGES, 2))


def test_out_of_memory_changes_no_sample(model, reference):
    split = load(model("Flux", unload=True))
    sample = begin(split, REQUEST)
    split.turns.enter(DENOISE)
    split.turns.clear_for(DENOISE)
    too_little = LEDGER.limit({ONE[0]: LEDGER.resident[ONE[0]] + 1000})
    with too_little, pytest.raises(OutOfMemory, match="pretend:0 is out of memory"):
        split.step([sample])
    assert sample.step == 0
    while not sample.done:
        split.step([sample])
    assert reference("Flux").miss(split.decode([sample])[0]) <= 1


def test_other_stages_make_way_when_a_stage_runs_out_of_memory(model, reference):
    alone_first, split = (load(model("Flux", unload=True)) for _ in range(2))
    sample = begin(alone_first, REQUEST)
    alone_first.turns.enter(DENOISE)
    alone_first.turns.clear_for(DENOISE)
    with LEDGER.limit({}):
        alone_first.step([sample])
        enough_alone = LEDGER.peak[ONE[0]]
    alone_first.turns.unload(DENOISE)

    sample = begin(split, REQUEST)
    split.turns.enter(DENOISE)
    with LEDGER.limit({ONE[0]: enough_alone}):  # too little beside the text encoders
        split.step([sample])
    assert not split.turns.is_loaded(ENCODE)
    while not sample.done:
        split.step([sample])
    assert reference("Flux").miss(split.decode([sample])[0]) <= 1


def test_latents_and_embeddings_of_a_backlog_take_no_device_memory(model):
    split = load(model("SD3", unload=True))
    sample = begin(split, REQUEST)
    split.step([sample])
    held = [sample.latents, *sample.conditioning.tensors.values()]
    assert {t.device.type for t in held} == {"cpu"}
    assert split.preview(sample) is None  # the decoder is not there, and none is loaded for it


def test_without_turns_they_are_on_the_first_device(model):
    split = load(model("SD3", devices=DEVICES))
    assert not split.phased
    sample = begin(split, REQUEST)
    split.step([sample])
    held = [sample.latents, *sample.conditioning.tensors.values()]
    assert {str(t.device) for t in held} == {DEVICES[0]}
    assert split.preview(sample).shape == (3, 64, 64)
