"""Replacements of torch's own CPU kernels, compared with double precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.cpu import by_row, gelu_tanh, tune
from pipelines.load import load_pipeline
from tests.pipelines.serving import entry


def _exact(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x.double(), approximate="tanh")


@settings(deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=64))
def test_gelu_is_as_accurate_as_torchs(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    exact = _exact(x)
    with torch.inference_mode():
        ours = (gelu_tanh(x) - exact).abs()
    theirs = (torch.nn.functional.gelu(x, approximate="tanh") - exact).abs()
    rounding = torch.finfo(torch.float32).eps * x.abs().double()
    assert (ours <= torch.maximum(2 * theirs, 2 * rounding)).all()


@pytest.mark.parametrize("x", [float("inf"), -float("inf"), float("nan"), -1e30, 1e30, 0.0])
def test_gelu_of_extreme_values_equals_torchs(x: float) -> None:
    value = torch.tensor([x] * 9)
    with torch.inference_mode():
        ours = gelu_tanh(value)
    theirs = torch.nn.functional.gelu(value, approximate="tanh")
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


def test_half_precision_and_gradients_are_left_to_torch() -> None:
    half = torch.linspace(-3, 3, 33, dtype=torch.bfloat16)
    theirs = torch.nn.functional.gelu(half, approximate="tanh")
    with torch.inference_mode():
        assert torch.equal(gelu_tanh(half), theirs)
    grown = torch.linspace(-3, 3, 33, requires_grad=True)
    gelu_tanh(grown).sum().backward()
    assert grown.grad is not None


def test_a_replica_on_the_cpu_is_tuned_and_equals_itself_untuned(tiny_folder) -> None:
    folder = entry(tiny_folder("Flux"), max_sequence_length=48)
    pipe = load_pipeline(folder, "cpu").family.pipe
    block = pipe.transformer.single_transformer_blocks[0]
    assert block.act_mlp.forward is gelu_tanh
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(block.act_mlp(x), torch.nn.GELU(approximate="tanh")(x), atol=1e-6)
    kernels = [weight for weight in pipe.vae.parameters() if weight.dim() == 4]
    assert kernels
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)


def test_other_devices_are_left_alone() -> None:
    module = torch.nn.Sequential(torch.nn.GELU(approximate="tanh"))
    tune(None, module, torch.device("cuda"))
    assert module[0].forward is not gelu_tanh


def test_convolutions_over_three_dimensions_keep_their_layout() -> None:
    class Pipe:
        vae = torch.nn.Sequential(torch.nn.Conv3d(2, 4, 3), torch.nn.Conv2d(4, 8, 3))

    tune(Pipe, None, torch.device("cpu"))
    deep, flat = Pipe.vae
    assert deep.weight.is_contiguous()
    assert flat.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(5, 33), (5, 1, 33), (3, 128), (8, 96)])
def test_one_vector_per_sample_has_the_bits_it_has_alone(shape: tuple[int, ...]) -> None:
    layer = torch.nn.Linear(shape[-1], 70)
    x = torch.randn(shape)
    with torch.inference_mode():
        together = by_row(layer.forward, x)
        alone = [layer(x[i : i + 1].clone()) for i in range(shape[0])]
    assert together.shape == (*shape[:-1], 70)
    assert torch.equal(together, torch.cat(alone))


def test_many_rows_per_sample_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    multiply = torch.nn.functional.linear

    def counted(x: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        products.append(tuple(x.shape))
        return multiply(x, *args)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    layer = torch.nn.Linear(4, 4)
    by_row(layer.forward, torch.randn(2, 9, 4))
    by_row(layer.forward, torch.randn(1, 4))
    assert products == [(2, 9, 4), (1, 4)]
