"""Compilation, quantization and caches: off by default, and refused where they'd be wrong."""

import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from structlog.testing import capture_logs

from jobs.catalog import CACHES, Defaults
from jobs.errors import ConfigurationError
from pipelines import families
from pipelines.acceleration import enable_cache
from pipelines.families.whole_call import WholeCall
from pipelines.load import load_pipeline
from pipelines.loading import quantization
from pipelines.placements.family_pipeline import FamilyPipeline
from tests.pipelines.rounding import served_alone
from tests.pipelines.serving import alone, ask, begin, entry

SMALL = {"defaults": Defaults(64, 64, 2, 3.5)}


def test_accelerations_are_off_by_default(tiny_folder, monkeypatch):
    monkeypatch.setattr("pipelines.placements.replica.run_once", lambda *_: pytest.fail("ran"))
    with capture_logs() as logs:
        pipeline = load_pipeline(entry(tiny_folder("Flux")), "cpu")
    transformer = pipeline.family.pipe.transformer
    assert logs == []
    assert not any(module._compiled_call_impl for module in transformer.modules())
    assert not transformer.is_cache_enabled
    assert transformer.context_embedder.weight.dtype == torch.float32


# Compilation. The compiler itself takes half a minute on a CPU.


def test_blocks_are_compiled_before_the_first_step(tiny_folder, monkeypatch):
    order = []
    forward = FluxTransformer2DModel.forward

    def compiling(self, **arguments):
        order.append(arguments)

    def running(self, **arguments):
        order.append("forward")
        return forward(self, **arguments)

    monkeypatch.setattr(FluxTransformer2DModel, "compile_repeated_blocks", compiling)
    monkeypatch.setattr(FluxTransformer2DModel, "forward", running)
    model = entry(tiny_folder("Flux"), compile=True, max_sequence_length=48, **SMALL)
    pipeline = load_pipeline(model, "cpu")
    assert order == [{"fullgraph": True, "dynamic": False}, "forward", "forward"]
    assert begin(pipeline, ask()).step == 0
    assert torch._dynamo.config.recompile_limit > 1000


def test_a_model_without_repeated_blocks_is_refused_by_name(tiny_folder):
    model = entry(tiny_folder("SD3"), compile=True, **SMALL)
    with pytest.raises(ConfigurationError, match="'tiny': compile: SD3Transformer2DModel has no"):
        load_pipeline(model, "cpu")


def test_a_compiler_that_fails_is_a_configuration_error(tiny_folder, monkeypatch):
    def failing(self, **arguments):
        raise RuntimeError("no C++ compiler\nand a page of advice")

    monkeypatch.setattr(FluxTransformer2DModel, "compile_repeated_blocks", failing)
    with pytest.raises(ConfigurationError, match=r"FluxTransformer2DModel: no C\+\+ compiler$"):
        load_pipeline(entry(tiny_folder("Flux"), compile=True, **SMALL), "cpu")


# Quantization.


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_quantization_without_torchao_says_what_to_install(tiny_folder, monkeypatch, quantization):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(
        ConfigurationError, match=f"'tiny': .*'{quantization}'.*pip install torchao"
    ):
        load_pipeline(entry(tiny_folder("Flux"), quantization=quantization), "cpu")


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_quantized_denoiser_makes_about_the_same_picture(tiny_folder, quantization):
    pytest.importorskip("torchao")
    fields = {"max_sequence_length": 48, "dtype": "bfloat16"}
    plain = load_pipeline(entry(tiny_folder("Flux"), **fields), "cpu")
    pipeline = load_pipeline(entry(tiny_folder("Flux"), quantization=quantization, **fields), "cpu")
    pipe = pipeline.family.pipe
    assert type(pipe.transformer.transformer_blocks[0].attn.to_q.weight) is not torch.nn.Parameter
    assert type(pipe.vae.decoder.conv_in.weight) is torch.nn.Parameter
    assert type(pipe.text_encoder_2.shared.weight) is torch.nn.Parameter
    request = ask(steps=2)
    change = (alone(pipeline, request) - alone(plain, request)).abs().mean().item()
    assert 0 < change < 0.05


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "scheme"),
    [
        ("cuda:0", (9, 0), "bfloat16", "dynamic by row"),
        ("cuda:0", (9, 0), "float16", "weights"),
        ("cuda:0", (8, 0), "bfloat16", "weights"),
        ("cpu", None, "bfloat16", "weights"),
    ],
)
def test_fp8_arithmetic_requires_a_device_that_has_it(
    monkeypatch, device, capability, dtype, scheme
):
    torchao = SimpleNamespace(
        Float8DynamicActivationFloat8WeightConfig=lambda granularity: f"dynamic by {granularity}",
        Float8WeightOnlyConfig=lambda: "weights",
        PerRow=lambda: "row",
    )
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    model = entry("x", quantization="fp8", dtype=dtype)
    with capture_logs() as logs:
        assert quantization.scheme_of(torchao, "fp8", model, torch.device(device)) == scheme
    assert bool(logs) == (scheme == "weights")


# Feature caches.


@pytest.mark.parametrize("cache", CACHES)
def test_caches_are_refused_with_step_batching(tiny_folder, monkeypatch, cache):
    monkeypatch.setattr(
        "pipelines.loading.checkpoint.Checkpoint.load", lambda *_: pytest.fail("loaded")
    )
    reason = "'tiny': cache requires a model that's called whole, but FluxPipeline is stepped"
    with pytest.raises(ConfigurationError, match=reason):
        load_pipeline(entry(tiny_folder("Flux"), cache=cache), "cpu")


def test_a_denoiser_without_caches_is_refused_by_name(tiny_folder, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", {})
    model = entry(tiny_folder("SD15"), cache="taylorseer")
    with pytest.raises(ConfigurationError, match="UNet2DConditionModel doesn't support caches"):
        load_pipeline(model, "cpu")


def test_a_cached_whole_call_is_independent_of_other_images(tiny_pipe):
    pipe = tiny_pipe("Flux")
    pipeline = FamilyPipeline(WholeCall(pipe, 48))
    requests = [ask(f"prompt {seed}", seed=seed, steps=10) for seed in (1, 2)]
    plain = alone(pipeline, requests[0])
    enable_cache(pipe.transformer, entry("x", cache="taylorseer"))
    first = served_alone(pipeline, requests[0])
    assert 0 < (first.picture - plain).abs().mean().item() < 0.05
    assert torch.equal(alone(pipeline, requests[0]), first.picture)
    samples = [begin(pipeline, request) for request in requests]
    pipeline.step(samples)
    assert first.miss(pipeline.decode(samples)[0]) <= 1


def test_an_aborted_call_leaves_the_cache_empty(tiny_pipe):
    pipe = tiny_pipe("Flux")
    pipeline = FamilyPipeline(WholeCall(pipe, 48))
    enable_cache(pipe.transformer, entry("x", cache="taylorseer"))
    request = ask(steps=10)
    first = alone(pipeline, request)
    cancelled = begin(pipeline, request)
    cancelled.cancelled = True
    pipeline.step([cancelled])
    assert not cancelled.done
    assert torch.equal(alone(pipeline, request), first)
