"""Every family on groups of 2 and 4 real ranks over gloo, compared with diffusers' pipelines."""

import re

import diffusers as d
import pytest
import torch

from tests.pipelines.placements.launch import run_cases
from tests.pipelines.tiny import BUILDERS, stir

FAMILIES = ("Flux", "Flux2", "Flux2Klein", "QwenImage", "ZImage")

# With and without guidance, negative prompts of other lengths; 80x48 has 15 tokens, which neither
# 2 nor 4 divides.
REQUESTS = [
    {"prompt": "a red cat", "seed": 1, "steps": 3, "negative_prompt": "ugly"},
    {"prompt": "a blue dog on a beach", "seed": 2, "steps": 2, "guidance_scale": 7.0},
    {"prompt": "a free one", "seed": 3, "steps": 2, "guidance_scale": 0.0},
]
ODD = [
    {
        "prompt": "x",
        "seed": 4,
        "steps": 2,
        "negative_prompt": "blurry, low",
        "width": 80,
        "height": 48,
    },
    {
        "prompt": "so be it",
        "seed": 5,
        "steps": 1,
        "guidance_scale": 0.0,
        "width": 80,
        "height": 48,
        "reproducible": False,
    },
    {"prompt": "a cat that is quick", "seed": 6, "steps": 2, "reproducible": False},
]


IDLE = 20.0
"""Seconds that a group is idle; a collective of a working group takes far less."""


def name_of(family, degrees):
    return " ".join([family, *(f"{name} {degree}" for name, degree in degrees.items())])


def even(family, **degrees):
    return name_of(family, degrees), family, degrees, REQUESTS


def odd(family, **degrees):
    return name_of(family, degrees), family, degrees, REQUESTS + ODD


TWO = [
    *(odd(family, ring=2) for family in FAMILIES),
    *(odd(family, ulysses=2) for family in FAMILIES),
    *(odd(family, cfg=2) for family in FAMILIES),
    *(even(family, tensor=2) for family in FAMILIES[:4]),
    odd("Chroma", cfg=2),
    even("Chroma", tensor=2),
    ("ZImage tensor 2", "ZImage", {"tensor": 2}, REQUESTS),
    ("Flux of 3 heads", "Flux", {"ulysses": 2}, REQUESTS[:1] + ODD[:1]),
]
FOUR = [
    *(even(family, ring=2, ulysses=2) for family in FAMILIES),
    *(odd(family, ring=4) for family in FAMILIES[:4]),
    even("ZImage", ring=4),
    *(odd(family, ulysses=4) for family in FAMILIES[:4]),
    even("ZImage", ulysses=4),
    *(odd(family, cfg=2, ulysses=2) for family in ("QwenImage", "ZImage")),
    ("Flux cfg 2 tensor 2", "Flux", {"cfg": 2, "tensor": 2}, REQUESTS[:1]),
    ("Chroma cfg 2 tensor 2", "Chroma", {"cfg": 2, "tensor": 2}, REQUESTS[:1]),
]
HALF = [
    (name_of(family, degrees) + " in bfloat16", family, degrees | {"dtype": "bfloat16"}, [])
    for family in FAMILIES
    for degrees in (
        {"ring": 2},
        {"ulysses": 2},
        {"cfg": 2},
        {"tensor": 2},
        {"placement": "pipelined", "stages": 2, "chunks": 2},
    )
    if family != "ZImage" or "tensor" not in degrees
] + [
    (name_of("Chroma", degrees) + " in bfloat16", "Chroma", degrees | {"dtype": "bfloat16"}, [])
    for degrees in ({"cfg": 2}, {"tensor": 2})
]
"""Verified at start, with rounding thousands of times that of float32."""

SABOTAGED = {
    "weights": ("Flux", {"ring": 2}, "weights"),
    "masks": ("QwenImage", {"ring": 2}, "masks"),
    "ZImage's masks": ("ZImage", {"ring": 2}, "masks"),
}
REFUSED = {
    "no plan": (
        "SD3",
        {"ulysses": 2},
        "no plan to split SD3Transformer2DModel; there are plans for",
    ),
    "pairs": (
        "Chroma",
        {"ulysses": 2},
        "ring and ulysses can't split ChromaTransformer2DModel: its attention mask scores pairs",
    ),
    "pairs in a ring": ("Chroma", {"ring": 2}, "can't split Chroma.*; cfg and tensor can"),
    "a UNet": ("SD15", {"cfg": 2}, "no plan to split StableDiffusionPipeline"),
    "ranks": ("Flux", {"ring": 3}, r"takes 3 processes \(ring 3\), but WORLD_SIZE is 2"),
    "compile": ("Flux", {"ring": 2, "compile": True}, "compile requires placement 'replica' or"),
    "weights": (
        "ZImage",
        {"tensor": 2},
        "tensor 2: .*a block of size 85 .* not divisible by 2",
    ),
    "kernel": (
        "Flux",
        {"ulysses": 2, "attention_backend": "flex"},
        "'flex' can't split a sequence; .*native",
    ),
    "no name": (
        "Flux",
        {"tensor": 2, "attention_backend": "cudnn"},
        "unknown attention_backend 'cudnn'; expected one of .*_native_cudnn",
    ),
    "no kernel": (
        "Flux",
        {"ring": 2, "attention_backend": "_native_npu"},
        "needs the log-sum-exp, which attention_backend '_native_npu' doesn't return on cpu",
    ),
}
REFUSED_BY_FOUR = {
    "both": ("Flux", {"ring": 2, "tensor": 2}, "tensor can't be combined with ring or ulysses"),
    "heads": ("ZImage", {"ulysses": 4}, "ulysses 4 leaves a rank without any of the 2 heads"),
    "tensors": ("ZImage", {"tensor": 4}, "tensor 4 doesn't divide the 2 heads"),
    "length": (
        "Flux",
        {"ring": 2, "ulysses": 2, "max_sequence_length": 50},
        "ring 2 x ulysses 2 doesn't divide the 50 tokens of a prompt",
    ),
}


CHANGED = {
    # 128 features between its feed-forward layers, which 2 divides, instead of 85.
    "ZImage tensor 2": ("ZImageTransformer2DModel", {"dim": 48, "axes_dims": [8, 8, 8]}),
    "ZImage ulysses 4": ("ZImageTransformer2DModel", {"dim": 64, "n_heads": 4, "n_kv_heads": 4}),
    "Flux of 3 heads": ("FluxTransformer2DModel", {"num_attention_heads": 3}),
}
"""Cases with another transformer in the tiny model."""


@pytest.fixture(scope="module")
def case(tiny_folder, tmp_path_factory):
    def changed(name, family):
        kind, fields = CHANGED[name]
        torch.manual_seed(0)
        pipe = BUILDERS[family]()
        config = dict(pipe.transformer.config) | fields
        pipe.transformer = getattr(d, kind).from_config(config)
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                stir(component)
        folder = tmp_path_factory.mktemp(family)
        pipe.save_pretrained(folder)
        return folder

    def make(name, family, degrees, requests, **more):
        folder = str(changed(name, family) if name in CHANGED else tiny_folder(family))
        fields = {"family": family, "folder": folder, "entry": degrees, "requests": requests}
        return {"name": name, **fields, **more}

    return make


@pytest.fixture(scope="module")
def two(case, tmp_path_factory):
    """Results of two ranks; the last case loses the group, so no other may follow."""
    cases = [case(*fields) for fields in TWO]
    cases += [case(name, family, degrees, []) for name, (family, degrees, _) in REFUSED.items()]
    cases += [case(*fields) for fields in HALF]
    cases += [
        case(f"{name} in {dtype}", family, degrees | {"dtype": dtype}, [], sabotage=sabotage)
        for name, (family, degrees, sabotage) in SABOTAGED.items()
        for dtype in ("float32", "bfloat16")
    ]
    cases += [
        case("idle", "Flux", {"ulysses": 2}, REQUESTS[:1], group_seconds=IDLE, pause=IDLE + 1),
        case("wrong code", "Flux", {"ring": 2}, [], sabotage="code"),
    ]
    return run_cases(2, tmp_path_factory.mktemp("two"), cases)


@pytest.fixture(scope="module")
def four(case, tmp_path_factory):
    """Results of four ranks."""
    refused = [{"seed": 9, "width": 80, "height": 48}]
    cases = [case(*fields, refused=refused) for fields in FOUR]
    cases += [case(name, *args, []) for name, (*args, _) in REFUSED_BY_FOUR.items()]
    return run_cases(4, tmp_path_factory.mktemp("four"), cases)


@pytest.mark.parametrize("name", [name for name, *_ in TWO])
def test_two_ranks_match_diffusers(two, name):
    check(two, name)


@pytest.mark.parametrize("name", [name for name, *_ in FOUR])
def test_four_ranks_match_diffusers(four, name):
    check(four, name)


def check(ranks, name):
    leader, *followers = (rank[name] for rank in ranks)
    assert "error" not in leader, leader
    assert max(leader["misses"].values()) <= 1, leader["misses"]
    assert all("error" not in follower for follower in followers)


@pytest.mark.parametrize("name", REFUSED)
def test_every_rank_refuses_unsupported_entries(two, name):
    refused(two, name, REFUSED[name][-1])


@pytest.mark.parametrize("name", REFUSED_BY_FOUR)
def test_every_rank_refuses_degrees_that_do_not_divide(four, name):
    refused(four, name, REFUSED_BY_FOUR[name][-1])


def refused(ranks, name, sentence):
    for rank in ranks:
        assert rank[name]["error"] == "ConfigurationError", rank[name]
        assert rank[name]["message"].startswith("model 'tiny': ")
        assert re.search(sentence, rank[name]["message"])


def test_unified_attention_refuses_sizes_that_do_not_divide(four):
    for family in ("Flux", "Flux2", "Flux2Klein", "QwenImage"):
        outcome = four[0][name_of(family, {"ring": 2, "ulysses": 2})]
        assert outcome["refused"] == {
            "9": "ImageFailed: 80x48 is 15 tokens, which ring 2 x ulysses 2 "
            "(unified attention) can't split evenly"
        }
    assert four[0]["ZImage ring 2 ulysses 2"]["refused"] == {}


def test_group_survives_idle_time_beyond_the_collective_timeout(two):
    assert two[0]["idle"]["misses"]["1"] <= 1


@pytest.mark.parametrize("name", [name for name, *_ in HALF])
def test_half_precision_rounding_passes_the_self_check(two, name):
    assert all("error" not in rank[name] for rank in two), two[0][name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SABOTAGED)
def test_group_with_wrong_results_is_refused(two, name, dtype):
    for rank in two:
        outcome = rank[f"{name} in {dtype}"]
        assert outcome["error"] == "ConfigurationError", outcome
        assert "its output differs from the whole one's by" in outcome["message"]


def test_failure_of_rank_0_while_loading_is_a_configuration_error(case, tmp_path):
    """As with a model too large for one device, where no kernel is tried before the group joins."""
    entry = {"tensor": 2, "attention_backend": "native"}
    leader, follower = run_cases(2, tmp_path, [case("", "Flux", entry, [], sabotage="kernel")])
    assert leader[""]["error"] == "ConfigurationError"
    assert (
        "rank 0 couldn't run its part of a forward pass: ImportError: no" in leader[""]["message"]
    )
    assert follower[""]["error"] == "GroupLost"


def test_follower_that_raises_ends_the_group(two):
    leader, follower = (rank["wrong code"] for rank in two)
    assert (leader["error"], follower["error"]) == ("GroupLost", "GroupLost")
    assert "rank 1 failed: TypeError" in leader["message"]
