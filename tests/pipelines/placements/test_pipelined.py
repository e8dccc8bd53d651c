"""The pipelined placement: stages cut from real models, run by real groups of processes."""

import json
import multiprocessing
import signal
from itertools import combinations, pairwise

import diffusers as d
import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.errors import ConfigurationError, ModelUnavailable
from pipelines.load import load_pipeline
from pipelines.loading.checkpoint import find_checkpoint
from pipelines.placements.stages import load_stage, plan_stages, split_points
from tests.pipelines.placements import stage_rank
from tests.pipelines.placements.launch import free_port
from tests.pipelines.placements.stage_rank import STEPS
from tests.pipelines.serving import entry
from tests.pipelines.tiny import BUILDERS, save_tiny
from tests.waiting import LONG_PATIENCE

CPU = torch.device("cpu")


# Where blocks are cut: pure functions.


@pytest.mark.parametrize(
    ("sizes", "stages", "first", "expected"),
    [
        ([1, 1, 1, 1], 1, 0, [4]),
        ([1, 1, 1, 1], 2, 0, [2, 2]),
        ([1, 1, 1, 1], 4, 0, [1, 1, 1, 1]),
        ([1, 1, 1], 2, 0, [1, 2]),  # the leader has other work too
        ([3, 1, 1, 1], 2, 0, [1, 3]),
        ([1, 1, 1, 3], 2, 0, [3, 1]),
        ([2, 2, 2, 1, 1, 1, 1], 2, 0, [2, 5]),
        ([1, 1, 1, 1], 2, 2, [1, 3]),  # Z-Image's refiners weigh on the first stage
        ([1, 1], 2, 9, [1, 1]),  # even if it's heavy: every stage has a block
        ([340] * 19 + [142] * 38, 2, 0, [17, 40]),  # FLUX.1: MB per block in bfloat16, halved
    ],
)
def test_blocks_are_split_by_their_bytes(sizes, stages, first, expected):
    assert [len(part) for part in split_points(sizes, stages, first)] == expected


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_no_other_split_has_a_smaller_largest_stage(stages):
    generator = torch.Generator().manual_seed(stages)
    for _ in range(20):
        sizes = torch.randint(1, 50, (8,), generator=generator).tolist()
        parts = split_points(sizes, stages, first=10)
        ranges = [(part.start, part.stop) for part in parts]
        assert (ranges[0][0], ranges[-1][1]) == (0, 8)
        assert all(left[1] == right[0] for left, right in pairwise(ranges))
        every = (pairwise((0, *cuts, 8)) for cuts in combinations(range(1, 8), stages - 1))
        assert largest(sizes, ranges) == min(largest(sizes, list(split)) for split in every)


def largest(sizes, split):
    return max(sum(sizes[start:end]) + (0 if start else 10) for start, end in split)


# What a stage loads.


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory):
    """A Flux with 4 + 8 blocks, which hold nearly all of its weights."""
    folder = save_tiny("Flux", tmp_path_factory.mktemp("deep") / "Flux")
    config = d.FluxTransformer2DModel.load_config(folder / "transformer")
    deeper = dict(config) | {"num_layers": 4, "num_single_layers": 8}
    torch.manual_seed(2)
    d.FluxTransformer2DModel.from_config(deeper).save_pretrained(folder / "transformer")
    return folder


def planned(folder, stages, **fields):
    model = entry(folder, placement="pipelined", stages=stages, **fields)
    return plan_stages(model, find_checkpoint(model))


def size(module):
    return sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_each_rank_loads_only_its_share_of_the_bytes(deep_folder, stages):
    whole = d.FluxTransformer2DModel.from_pretrained(deep_folder / "transformer")
    blocks = size(whole.transformer_blocks) + size(whole.single_transformer_blocks)
    outside = size(whole) - blocks
    parts = [load_stage(planned(deep_folder, stages), rank, CPU).module for rank in range(stages)]
    assert sum(size(part) - outside for part in parts) == blocks
    for part in parts:
        assert size(part) - outside <= blocks / stages * 1.25
        assert not any(tensor.is_meta for tensor in part.state_dict().values())


def test_weights_of_other_stages_are_not_read(deep_folder, monkeypatch):
    read = []
    opened = load_stage.__globals__["safe_open"]

    class Spy:
        def __init__(self, *args, **kwargs):
            self.file = opened(*args, **kwargs).__enter__()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    plan = planned(deep_folder, 2)
    monkeypatch.setitem(load_stage.__globals__, "safe_open", Spy)
    stage = load_stage(plan, 1, CPU)
    blocks = {".".join(name.split(".")[:2]) for name in read if "transformer_blocks." in name}
    assert blocks == set(stage.own)
    assert len(blocks) < 12


def test_stage_has_the_entrys_dtype(deep_folder):
    stage = load_stage(planned(deep_folder, 2, dtype="bfloat16"), 1, CPU)
    assert {p.dtype for p in stage.module.parameters()} == {torch.bfloat16}


# Refusals, before any process waits for another.


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("SD15", {}, "StableDiffusionPipeline has no transformer"),
        ("Flux", {"stages": 4}, "stages = 4, but there are only 3 blocks"),
        ("Flux", {"compile": True}, "compile requires placement 'replica' or 'split'"),
        ("Flux", {}, "WORLD_SIZE is 3"),
    ],
)
def test_unsupported_entries_are_refused(tiny_folder, monkeypatch, name, fields, message):
    for variable, value in (("RANK", 0), ("WORLD_SIZE", 3), ("MASTER_PORT", 1)):
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    model = entry(tiny_folder(name), placement="pipelined", **({"stages": 2} | fields))
    with pytest.raises(ConfigurationError, match=message):
        load_pipeline(model, "cpu")


def test_transformer_whose_blocks_use_their_index_is_refused(tiny_folder):
    with pytest.raises(ConfigurationError, match="can't cut ChromaTransformer2DModel"):
        planned(tiny_folder("Chroma"), 2)


def test_missing_weight_is_named(tmp_path):
    folder = save_tiny("Flux", tmp_path / "Flux")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    removed = "single_transformer_blocks.1.proj_out.weight"
    save_file({name: w for name, w in weights.items() if name != removed}, path)
    load_stage(planned(folder, 2), 0, CPU)  # the weight isn't one of the first stage's
    with pytest.raises(ModelUnavailable, match="missing weight single_transformer_blocks"):
        load_stage(planned(folder, 2), 1, CPU)


# Groups of processes.


def launch(world, folder, cases, killed=()):
    """Each rank's results, as a dict by the case's name.

    The ranks are forked from one server, which imports diffusers once for all of them.
    """
    for case in cases:
        case["entry"] = {"stages": world, "chunks": 2} | case.get("entry", {})
        case["port"] = free_port()
    path = folder / "plan.json"
    path.write_text(json.dumps({"cases": cases}))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([stage_rank.__name__])
    ranks = [context.Process(target=stage_rank.run, args=(r, world, path)) for r in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(LONG_PATIENCE)
    ends = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
        rank.join()
        rank.close()
    assert ends == [-signal.SIGKILL if number in killed else 0 for number in range(world)]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


PAIRED = ("Flux", "Flux2", "Flux2Klein", "QwenImage", "ZImage", "SD3", "PixArtSigma", "Sana")


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_folder, deep_folder):
    """Two ranks: every family, then whether stages overlap, then a rank that hangs."""
    folder = tmp_path_factory.mktemp("two")
    cases = [
        {"name": name, "family": name, "folder": str(folder_of(name, tiny_folder, folder))}
        | {"act": "compare"}
        for name in PAIRED
    ]
    deep = {"family": "Flux", "folder": str(deep_folder)}
    cases.append({"name": "watch", "act": "watch", "begun": str(folder / "begun")} | deep)
    cases.append({"name": "hangs", "act": "lose", "faulty": 1, "seconds": 3} | deep)
    cases[-1]["fault"] = "hangs"
    return launch(2, folder, cases)


def folder_of(name, tiny_folder, scratch):
    """The tiny model's folder; Sana's has only one block, so it's rebuilt with three."""
    if name != "Sana":
        return tiny_folder(name)
    torch.manual_seed(0)
    pipe = BUILDERS[name]()
    config = dict(pipe.transformer.config) | {"num_layers": 3}
    pipe.transformer = d.SanaTransformer2DModel.from_config(config)
    pipe.save_pretrained(scratch / name)
    return scratch / name


@pytest.fixture(scope="module")
def four(tmp_path_factory, deep_folder):
    """Four ranks: one model, then a rank in the middle that gets killed."""
    deep = {"family": "Flux", "folder": str(deep_folder), "entry": {"chunks": 4}}
    cases = [
        {"name": "Flux", "act": "compare"} | deep,
        {"name": "gather", "act": "gather"} | deep,
        {"name": "dies", "act": "lose", "faulty": 2, "fault": "dies"} | deep,
    ]
    return launch(4, tmp_path_factory.mktemp("four"), cases, killed=(2,))


@pytest.mark.parametrize("family", PAIRED)
def test_two_stages_match_diffusers(two, family):
    seen = two[0][family]
    assert seen["in_flight"] == 2
    assert seen["forwards"] < 15
    for misses in (seen["joined"], seen["at_once"]):
        assert len(misses) == 4
        assert max(misses.values()) <= 1


def test_four_stages_match_diffusers(four):
    seen = four[0]["Flux"]
    assert seen["in_flight"] == 4
    assert max([*seen["joined"].values(), *seen["at_once"].values()]) <= 1
    assert sum(len(rank["Flux"]["own"]) for rank in four[1:] if "own" in rank["Flux"]) < 12


def test_all_ranks_get_the_output_only_if_gathered(four):
    outputs = [rank["Flux"].get("output") for rank in four]
    assert [output is None for output in outputs[1:]] == [True, True, False]
    gathered = [rank["gather"]["output"] for rank in four]
    assert gathered[0] is not None
    assert gathered == [gathered[0]] * 4


def test_stages_overlap_only_with_two_passes_in_flight(two):
    ahead = two[1]["watch"]["ahead"]
    assert ahead == [0] * STEPS + [1] * (2 * STEPS - 1) + [0]


def test_killed_stage_ends_every_thread_and_rank(four):
    seen = four[0]["dies"]
    assert len(seen["seen"]) == 2
    assert all(error.startswith("GroupLost: rank 2 is gone") for error in seen["seen"])
    for rank in (1, 3):
        assert four[rank]["dies"]["error"] == "GroupLost"


def test_hanging_stage_loses_the_group_in_time(two):
    seen = two[0]["hangs"]
    assert len(seen["seen"]) == 2
    assert all(error.startswith("GroupLost") for error in seen["seen"])
    assert two[1]["hangs"]["error"] == "GroupLost"
