"""Quantized weights, stored or quantized while loading, with split: counted bytes match memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.catalog import Defaults, Model
from jobs.errors import ConfigurationError
from pipelines.load import load_pipeline
from pipelines.loading.checkpoint import find_checkpoint
from pipelines.loading.quantization import quantizers, stored_method
from pipelines.placements.family_pipeline import FamilyPipeline
from pipelines.placements.split import load_split
from pipelines.planner.memory import CPU
from pipelines.planner.skeleton import DENOISE, parts, skeletons
from tests.pipelines.serving import alone, ask, entry
from tests.pipelines.test_single_file import transformer_of
from tests.pipelines.tiny_files import save_gguf, save_single, without_weights

REQUEST = ask(steps=2)
SMALL = Defaults(width=64, height=64, steps=2, guidance_scale=3.5)


def held(tensor: torch.Tensor) -> int:
    """A tensor's bytes, including those inside a torchao tensor."""
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) is not torch.nn.Parameter:
        names, _ = tensor.__tensor_flatten__()
        return sum(held(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def counted(model: Model) -> dict[str, int]:
    checkpoint = find_checkpoint(model)
    by_stage = parts(skeletons(model, checkpoint), checkpoint, model)
    return {part.name: part.size for stage_parts in by_stage.values() for part in stage_parts}


def check_counted(model: Model) -> Any:
    """Check that the counted bytes match the loaded pipeline's; returns the pipeline."""
    pipeline = load_pipeline(model, "cpu")
    for name, size in counted(model).items():
        module = getattr(pipeline.family.pipe, name)
        tensors = [*module.parameters(), *module.buffers()]
        assert sum(map(held, tensors)) == size, name
    return pipeline


@pytest.fixture
def gguf_model(tiny_folder, tmp_path):
    folder = without_weights(tiny_folder("Flux"), tmp_path / "configs", ["transformer"])
    path = save_gguf(transformer_of(tiny_folder("Flux")), tmp_path / "model.gguf", "Q8_0")
    return entry(path, config=str(folder), max_sequence_length=48, defaults=SMALL)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_counted_bytes_of_a_gguf_match_memory(gguf_model, tiny_folder, dtype):
    model = replace(gguf_model, dtype=dtype)
    check_counted(model)
    plain = counted(entry(tiny_folder("Flux"), dtype=dtype))
    assert counted(model)["transformer"] < plain["transformer"]
    assert counted(model)["vae"] == plain["vae"]
    assert stored_method(find_checkpoint(model).source("transformer")) == "Q8_0"


def test_a_file_with_scales_is_read_as_stored(tiny_folder, tmp_path):
    """FLUX.2 in fp8 with a scale per row, with Black Forest Labs' names."""
    folder = without_weights(tiny_folder("Flux2Klein"), tmp_path / "configs", ["transformer"])
    path = save_single("Flux2Klein", tiny_folder("Flux2Klein"), tmp_path / "model.safetensors")
    stored, dense = {}, {}
    for name, tensor in load_file(path).items():
        stored[name] = dense[name] = tensor
        if "_blocks." in name and tensor.dim() == 2:
            scale = tensor.abs().amax(dim=1) / 448
            stored[name] = (tensor / scale[:, None]).to(torch.float8_e4m3fn)
            stored[f"{name}_scale"] = scale
            dense[name] = stored[name].float() * scale[:, None]
    save_file(stored, path)
    save_file(dense, tmp_path / "dense.safetensors")
    model = entry(path, config=str(folder), defaults=SMALL)
    picture = alone(check_counted(model), REQUEST)
    assert stored_method(find_checkpoint(model).source("transformer")) == "fp8"
    same = replace(model, path=str(tmp_path / "dense.safetensors"))
    assert (picture - alone(load_pipeline(same, CPU), REQUEST)).abs().max() <= 1e-5


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_the_counted_bytes_of_a_quantized_model_match_memory(tiny_folder, scheme):
    pytest.importorskip("torchao")
    check_counted(entry(tiny_folder("Flux"), dtype="bfloat16", quantization=scheme))


def test_components_are_quantized_by_name(tiny_folder):
    pytest.importorskip("torchao")
    fields = {"dtype": "bfloat16", "max_sequence_length": 48}
    plain = load_pipeline(entry(tiny_folder("Flux"), **fields), "cpu")
    quantization = {"transformer": "fp8", "text_encoder_2": "int8"}
    pipeline = check_counted(entry(tiny_folder("Flux"), quantization=quantization, **fields))
    kind = torch.nn.Parameter
    pipe = pipeline.family.pipe
    assert type(pipe.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q.weight) is not kind
    assert type(pipe.text_encoder.encoder.layers[0].self_attn.q_proj.weight) is kind
    change = (alone(pipeline, REQUEST) - alone(plain, REQUEST)).abs().mean().item()
    assert 0 < change < 0.05
    model = entry(tiny_folder("Flux"), quantization={"unet": "int8"})
    with pytest.raises(
        ConfigurationError, match="quantization: unknown component 'unet'; expected"
    ):
        load_pipeline(model, "cpu")


def test_a_text_encoder_is_quantized_from_its_own_file(tiny_folder, tmp_path):
    pytest.importorskip("torchao")
    whole = tiny_folder("SD3")
    file = str(whole / "text_encoder_3" / "model.safetensors")
    fields = {"dtype": "bfloat16", "max_sequence_length": 48}
    quantization = {"text_encoder_3": "int8"}
    model = entry(whole, quantization=quantization, components={"text_encoder_3": file}, **fields)
    expected = load_pipeline(entry(whole, quantization=quantization, **fields), "cpu")
    assert torch.equal(alone(check_counted(model), REQUEST), alone(expected, REQUEST))
    folder = without_weights(whole, tmp_path / "configs", ["transformer", "text_encoder_3"])
    path = save_single("SD3", whole, tmp_path / "model.safetensors")
    model = entry(path, config=str(folder), quantization=quantization, **fields)
    with pytest.raises(ConfigurationError, match="can't quantize the text_encoder_3 from"):
        load_pipeline(model, "cpu")


@pytest.fixture
def published(tiny_folder, tmp_path) -> Path:
    """A folder whose transformer torchao stored as int8, as its config says."""
    pytest.importorskip("torchao")
    model = entry(tiny_folder("Flux"), dtype="bfloat16", quantization="int8")
    pipe = load_pipeline(model, "cpu").family.pipe
    folder = without_weights(tiny_folder("Flux"), tmp_path / "model", ["transformer"])
    pipe.transformer.save_pretrained(folder / "transformer")
    return folder


def test_a_folder_is_loaded_as_it_was_published(tiny_folder, published):
    fields = {"dtype": "bfloat16", "max_sequence_length": 48}
    pipeline = check_counted(entry(published, **fields))
    again = load_pipeline(entry(tiny_folder("Flux"), quantization="int8", **fields), "cpu")
    assert torch.equal(alone(pipeline, REQUEST), alone(again, REQUEST))
    with pytest.raises(ConfigurationError, match=r"is already quantized \(torchao\); leave"):
        load_pipeline(entry(published, quantization="int8", **fields), "cpu")


def test_a_quantized_text_encoder_is_loaded_as_it_was_published(tiny_folder, tmp_path):
    pytest.importorskip("torchao")
    fields = {"dtype": "bfloat16", "max_sequence_length": 48}
    model = entry(tiny_folder("Flux"), quantization={"text_encoder_2": "int8"}, **fields)
    pipeline = load_pipeline(model, CPU)
    folder = without_weights(tiny_folder("Flux"), tmp_path / "model", ["text_encoder_2"])
    pipeline.family.pipe.text_encoder_2.save_pretrained(folder / "text_encoder_2")
    again = check_counted(entry(folder, **fields))
    assert torch.equal(alone(again, REQUEST), alone(pipeline, REQUEST))


@pytest.fixture
def untuned(monkeypatch):
    """Replicas without the tuning for a CPU that a split doesn't have, which changes bits."""
    monkeypatch.setattr("pipelines.placements.replica.tune", lambda *_: None)


@pytest.mark.usefixtures("untuned")
@pytest.mark.parametrize("unload", [True, False])
def test_a_split_loads_a_gguf(gguf_model, unload):
    model = replace(gguf_model, placement="split", unload=unload)
    split = load_split(model, find_checkpoint(model), CPU)
    assert torch.equal(alone(split, REQUEST), alone(load_pipeline(gguf_model, CPU), REQUEST))
    split.loader.unload(DENOISE)
    again = replace(REQUEST, prompt="another", seed=5)
    expected = alone(load_pipeline(gguf_model, CPU), again)
    assert torch.equal(alone(split, again), expected)
    assert split.loader.loads[DENOISE] == 2


@pytest.mark.usefixtures("untuned")
@pytest.mark.parametrize("unload", [True, False])
def test_a_split_loads_a_quantized_folder(published, unload):
    model = entry(published, dtype="bfloat16", max_sequence_length=48, defaults=SMALL)
    expected = alone(load_pipeline(model, CPU), REQUEST)
    model = replace(model, placement="split", unload=unload)
    split = load_split(model, find_checkpoint(model), CPU)
    split.loader.unload(DENOISE)
    assert torch.equal(alone(split, REQUEST), expected)


@pytest.mark.usefixtures("untuned")
def test_a_split_quantizes_at_every_load(tiny_folder):
    pytest.importorskip("torchao")
    fields = {"dtype": "bfloat16", "max_sequence_length": 48, "defaults": SMALL}
    model = entry(tiny_folder("Flux"), quantization="int8", **fields)
    expected = alone(load_pipeline(model, CPU), REQUEST)
    model = replace(model, placement="split", unload=True)
    split = load_split(model, find_checkpoint(model), CPU)
    split.loader.unload(DENOISE)
    assert torch.equal(alone(split, REQUEST), expected)


@pytest.mark.usefixtures("untuned")
@pytest.mark.parametrize("stored", ["gguf_model", "published"])
def test_a_copy_on_the_cpu_and_a_streamed_one_compute_the_same(stored, request):
    """Neither loses a quantized tensor's metadata."""
    source = request.getfixturevalue(stored)
    fields = {"dtype": "bfloat16", "max_sequence_length": 48, "defaults": SMALL}
    model = source if isinstance(source, Model) else entry(source, **fields)
    expected = alone(load_pipeline(model, CPU), REQUEST)
    model = replace(model, placement="split", unload=True, max_memory={CPU: "1GB"})
    split = load_split(model, find_checkpoint(model), CPU)
    for _ in range(2):  # the first copy is made while loading, the second from the CPU copy
        split.loader.unload(DENOISE)
        assert torch.equal(alone(split, replace(REQUEST)), expected)
    split.loader.unload(DENOISE)
    pipe = split.plain.pipe
    pipe.transformer = split.loader.streamed("transformer")
    assert torch.equal(alone(FamilyPipeline(split.plain, split.cache), REQUEST), expected)


def test_no_scheme_means_no_quantizer(tiny_folder):
    model = entry(tiny_folder("Flux"))
    assert quantizers(model, find_checkpoint(model), CPU) == {}
