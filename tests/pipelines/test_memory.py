"""The planner: every block is placed, no device is overfull, and the order is right."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import ConfigurationError
from pipelines.planner.memory import CPU, DISK, Part, bytes_of, in_words, plan

GB = 10**9
T5 = Part("text_encoder_2", {f"block.{n}": 390 for n in range(24)}, rest=160, activations=100)
CLIP = Part("text_encoder", {"layer": 200}, rest=50, activations=20)
DENOISER = Part("transformer", {f"block.{n}": 417 for n in range(57)}, rest=31, activations=680)
VAE = Part("vae", {"up": 160}, activations=1700, may_be_cut=False)
FLUX = {"encode": [CLIP, T5], "denoise": [DENOISER], "decode": [VAE]}
"""FLUX.1-dev in bfloat16, in MB."""


def planned(rooms, in_turn=False, stages=FLUX):
    return plan(stages, rooms, first="denoise", in_turn=in_turn)


def devices(layout):
    return {name: spread.main for name, spread in layout.spreads.items()}


def test_everything_goes_on_one_device_with_room():
    layout = planned({"a": 40_000})
    assert set(devices(layout).values()) == {"a"}
    assert layout.fit_together(layout.stages, running="denoise")


def test_the_denoiser_stays_whole_and_the_rest_goes_elsewhere():
    layout = planned({"a": 25_000, "b": 16_000})
    assert devices(layout) == {
        "transformer": "a",
        "text_encoder": "b",
        "text_encoder_2": "b",
        "vae": "b",
    }
    assert layout.spreads["transformer"].where == {"": "a"}


def test_text_encoders_are_balanced_over_the_devices():
    small = Part("text_encoder", {"layer": 5000}, activations=10)
    layout = planned({"a": 26_000, "b": 16_000, "c": 16_000}, stages=FLUX | {"encode": [small, T5]})
    assert {devices(layout)[name] for name in ("text_encoder", "text_encoder_2")} == {"b", "c"}


def test_the_denoiser_is_cut_if_no_device_has_room():
    layout = planned({"a": 20_000, "b": 20_000})
    spread = layout.spreads["transformer"]
    assert set(spread.where.values()) == {"a", "b"}
    assert spread.streamed == 0


def test_blocks_overflow_to_the_cpu_and_then_to_the_disk():
    layout = planned({"a": 16_000, CPU: 5000, DISK: 10**9}, in_turn=True)
    spread = layout.spreads["transformer"]
    assert [spread.weights[p] > 0 for p in ("a", CPU, DISK)] == [True, True, True]
    assert spread.weights[CPU] <= 5000
    assert spread.streamed == spread.weights[CPU] + spread.weights[DISK]
    assert spread.brought == 417


def test_stages_in_turn_can_use_all_the_room():
    with pytest.raises(ConfigurationError):
        planned({"a": 25_000})
    layout = planned({"a": 25_000}, in_turn=True)
    assert set(devices(layout).values()) == {"a"}
    assert not layout.fit_together(["encode", "denoise"], running="denoise")
    assert layout.fit_together(["denoise"], running="denoise")


def test_with_a_second_device_nothing_needs_unloading():
    layout = planned({"a": 25_000, "b": 25_000}, in_turn=True)
    assert layout.fit_together(layout.stages, running="denoise")


def test_a_vae_without_a_device_runs_on_the_cpu():
    vae = Part("vae", {"up": 160}, activations=30_000, may_be_cut=False)
    layout = planned({"a": 25_000, CPU: 64_000}, in_turn=True, stages=FLUX | {"decode": [vae]})
    assert layout.spreads["vae"].main == CPU


def test_the_cpu_is_a_device_if_it_is_the_only_one():
    layout = planned({CPU: 40_000, DISK: 10**9})
    assert set(devices(layout).values()) == {CPU}
    waiting = planned({CPU: 10_000, DISK: 10**9}, in_turn=True).spreads["transformer"]
    assert waiting.streamed > 0 and set(waiting.where.values()) == {CPU, DISK}


def test_the_error_for_a_model_that_does_not_fit_has_the_arithmetic():
    stages = FLUX | {"denoise": [Part("transformer", {"block": 24 * GB}, 2 * GB, GB)]}
    with pytest.raises(
        ConfigurationError, match=r"transformer needs 26\.0 GB of weights .* a 20\.0 GB"
    ):
        planned({"a": 20 * GB, CPU: 0}, stages=stages)


parts = st.builds(
    Part,
    st.just("part"),
    st.lists(st.integers(1, 50), min_size=1, max_size=12).map(
        lambda sizes: {f"b.{n}": size for n, size in enumerate(sizes)}
    ),
    st.integers(0, 20),
    st.integers(0, 30),
)
rooms = st.fixed_dictionaries(
    {"a": st.integers(0, 300), "b": st.integers(0, 300), CPU: st.integers(0, 200)},
    optional={DISK: st.just(10**6)},
)


@given(parts, parts, parts, rooms, st.booleans())
def test_every_block_is_placed_and_no_device_is_overfull(encoder, denoiser, decoder, room, in_turn):
    stages = {"encode": [encoder], "denoise": [denoiser], "decode": [decoder]}
    try:
        layout = planned(room, in_turn, stages)
    except ConfigurationError:
        return
    for (spread,) in layout.stages.values():
        assert sum(spread.weights.values()) == spread.part.size
        assert set(spread.where) in ({""}, set(spread.part.blocks))
    for running in layout.stages:
        held = [running] if in_turn else layout.stages
        assert layout.fit_together(held, running)


@given(parts, rooms)
def test_a_model_that_fits_one_device_alone_always_has_a_plan_in_turn(part, room):
    stages = {"encode": [part], "denoise": [part], "decode": [part]}
    if part.size + part.activations <= max(room["a"], room["b"]):
        assert devices(planned(room, True, stages))


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GB", 16 * GB), ("1.5 GiB", 3 * 2**29), ("200MB", 2 * 10**8), ("7B", 7), (5, 5)],
)
def test_sizes_are_parsed(text, size):
    assert bytes_of(text) == size


def test_sizes_are_formatted():
    assert [in_words(n) for n in (0, 999, 23_802_816_640, 5_000_000)] == [
        "0 B",
        "999 B",
        "23.8 GB",
        "5.0 MB",
    ]
    with pytest.raises(ConfigurationError, match="invalid size 'lots'"):
        bytes_of("lots")
