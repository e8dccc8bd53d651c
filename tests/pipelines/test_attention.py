"""The attention kernel: the catalog's or refused, the device's best or a logged fallback."""

from functools import partial

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from structlog.testing import capture_logs

from jobs.catalog import Defaults
from jobs.errors import ConfigurationError, OutOfMemory
from pipelines.acceleration import denoiser_of, run_once
from pipelines.attention import CUDNN, choose_attention
from pipelines.families import make_family
from pipelines.load import load_pipeline
from pipelines.placements.placed import Placed
from tests.pipelines.rounding import served_alone
from tests.pipelines.serving import alone, ask, entry

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SMALL = {"defaults": Defaults(64, 64, 2, 3.5), "max_sequence_length": 48}


@pytest.fixture(autouse=True)
def _the_process_keeps_its_default():
    before = _AttentionBackendRegistry.get_active_backend()
    yield
    assert _AttentionBackendRegistry.get_active_backend() == before


@pytest.fixture
def transformer(tiny_pipe, monkeypatch):
    """As on a GPU with cuDNN, as far as one can ask."""
    monkeypatch.setattr("torch.backends.cudnn.is_available", lambda: True)
    return tiny_pipe("Flux").transformer.to(torch.bfloat16)


def backends(denoiser) -> set[AttentionBackendName | None]:
    processors = (getattr(module, "processor", None) for module in denoiser.modules())
    return {p._attention_backend for p in processors if hasattr(p, "_attention_backend")}


def refusing() -> None:
    raise RuntimeError("No available kernel. Aborting execution.\nand much more")


def nothing() -> None:
    """A trial that finds no fault."""


def test_cuda_gets_cudnn_when_the_trial_runs(transformer):
    tried = []
    with capture_logs() as logs:
        choose_attention(transformer, None, CUDA, lambda: tried.append(backends(transformer)))
    assert tried == [{CUDNN}]
    assert backends(transformer) == {CUDNN}
    assert [(line["log_level"], line["backend"]) for line in logs] == [("info", CUDNN)]


def test_cuda_falls_back_aloud_when_the_trial_does_not_run(transformer):
    with capture_logs() as logs:
        choose_attention(transformer, None, CUDA, refusing)
    assert backends(transformer) == {"native"}
    [line] = logs
    assert (line["log_level"], line["backend"], line["instead_of"]) == ("warning", "native", CUDNN)
    assert line["reason"] == "No available kernel. Aborting execution."


def test_a_trial_without_memory_proves_nothing_of_a_kernel(transformer):
    def full() -> None:
        raise OutOfMemory("no memory")

    with pytest.raises(OutOfMemory):
        choose_attention(transformer, None, CUDA, full)


@pytest.mark.parametrize("case", ["cpu", "float32", "no cuDNN", "no backends", "environment"])
def test_everything_else_is_left_alone(transformer, tiny_pipe, monkeypatch, case):
    device, denoiser = CUDA, transformer
    if case == "cpu":
        device = CPU
    elif case == "float32":
        denoiser.to(torch.float32)
    elif case == "no cuDNN":
        monkeypatch.setattr("torch.backends.cudnn.is_available", lambda: False)
    elif case == "no backends":
        denoiser = tiny_pipe("SD15").unet.to(torch.bfloat16)
    else:
        monkeypatch.setattr("pipelines.attention.DIFFUSERS_ATTN_BACKEND", "flash")
    with capture_logs() as logs:
        choose_attention(denoiser, None, device, lambda: pytest.fail("tried"))
    assert logs == []
    assert backends(denoiser) <= {None}


def test_the_catalogs_backend_runs(tiny_folder):
    model = entry(tiny_folder("Flux"), attention_backend="_native_math", **SMALL)
    pipeline = load_pipeline(model, "cpu")
    assert backends(pipeline.family.pipe.transformer) == {"_native_math"}
    plain = load_pipeline(entry(tiny_folder("Flux"), **SMALL), "cpu")
    assert backends(plain.family.pipe.transformer) == {None}
    assert served_alone(plain, ask()).miss(alone(pipeline, ask())) <= 1


@pytest.mark.parametrize(
    ("name", "backend", "reason"),
    [
        ("Flux", "nonsense", "must be one of"),
        ("Flux", "flash", "flash-attn"),
        ("Flux", CUDNN, "does not run here: No viable backend"),
        ("SD15", "native", "UNet2DConditionModel lets none be chosen"),
    ],
)
def test_a_catalogs_backend_that_cannot_run_is_refused(tiny_folder, name, backend, reason):
    fields = SMALL if name == "Flux" else {"defaults": SMALL["defaults"]}
    model = entry(tiny_folder(name), attention_backend=backend, **fields)
    with pytest.raises(
        ConfigurationError, match=f"'tiny': attention_backend '{backend}'.*{reason}"
    ):
        load_pipeline(model, "cpu")


def test_the_trial_covers_one_prompt_and_two_of_unequal_length(tiny_pipe, monkeypatch):
    """So that kernels without masks are found out."""
    pipeline = Placed(make_family(tiny_pipe("QwenImage"), None))
    denoiser, seen = denoiser_of(pipeline.family.pipe), []
    forward = denoiser.forward

    def watched(**arguments):
        mask = arguments["encoder_hidden_states_mask"]
        seen.append((len(arguments["hidden_states"]), mask is not None))
        return forward(**arguments)

    monkeypatch.setattr(denoiser, "forward", watched)
    trial = partial(run_once, pipeline, entry("x", defaults=Defaults(72, 64, 8, 1.0)))
    trial()
    assert seen == [(1, False), (2, True)]


def test_a_trial_of_two_that_do_not_fit_passes(tiny_pipe, monkeypatch):
    pipeline = Placed(make_family(tiny_pipe("Flux"), 48))
    step = pipeline.family.step

    def limited(samples, bucket=0):
        if len(samples) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(samples, bucket)

    monkeypatch.setattr(pipeline.family, "step", limited)
    run_once(pipeline, entry("x", **SMALL))
