"""Acceleration on a GPU: compilation, attention kernels, quantization and CUDA graphs."""

import threading

import pytest
import torch
from structlog.testing import capture_logs

from jobs.catalog import Defaults
from jobs.errors import ConfigurationError
from pipelines import acceleration
from pipelines.attention import backend_of
from pipelines.load import load_pipeline
from pipelines.loading.quantization import FP8_CAPABILITY
from tests.gpu.test_families import ARRIVALS, NAMES, REQUESTS, length_of
from tests.pipelines.rounding import Reference, modules_of, served_alone
from tests.pipelines.serving import alone, ask, begin, entry, serve
from tests.workers.test_attention_threads import check_threads

# numpy 2 warns about a call in diffusers' schedulers.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SMALL = Defaults(64, 64, 2, 3.5)


@pytest.fixture
def load(tiny_folder, device):
    """Load a tiny pipeline by name, with extra fields in its entry."""

    def loaded(name, **fields):
        known = {"defaults": SMALL, "max_sequence_length": length_of(name)}
        return load_pipeline(entry(tiny_folder(name), **(known | fields)), device)

    return loaded


def mean(one, other):
    return (one - other).abs().mean().item()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_blocks_make_the_same_picture(load):
    plain, compiled = load("Flux"), load("Flux", compile=True)
    for request in (ask(seed=1), ask(seed=2, width=96)):
        assert served_alone(plain, request).miss(alone(compiled, request)) <= 1


# Attention kernels.


RUN_EVERYWHERE = ("native", "_native_math")


@pytest.mark.parametrize("backend", [*RUN_EVERYWHERE, "_native_flash", "_native_cudnn"])
@pytest.mark.parametrize("name", ["Flux", "Flux2Klein", "QwenImage"])
def test_a_kernel_gives_the_same_picture_or_is_refused_on_load(load, name, backend):
    plain = load(name, dtype="bfloat16", attention_backend="native")
    pipeline, refusal = None, ""
    try:
        pipeline = load(name, dtype="bfloat16", attention_backend=backend)
    except ConfigurationError as error:
        refusal = str(error)
    if pipeline is None:
        assert backend not in RUN_EVERYWHERE
        assert f"attention_backend {backend!r} doesn't run here" in refusal
    else:
        assert backend_of(acceleration.denoiser_of(pipeline.family.pipe)) == backend
        assert served_alone(plain, REQUESTS[0]).miss(alone(pipeline, REQUESTS[0])) <= 1


def test_torch_chooses_the_kernel_by_default(load):
    pipeline = load("Flux", dtype="bfloat16")
    assert backend_of(pipeline.family.pipe.transformer) is None
    native = load("Flux", dtype="bfloat16", attention_backend="native")
    assert torch.equal(alone(pipeline, REQUESTS[0]), alone(native, REQUESTS[0]))


@pytest.mark.parametrize("backend", [*RUN_EVERYWHERE, "_native_flash", "_native_cudnn"])
def test_encoding_and_decoding_next_to_the_engine_change_no_bit(load, backend):
    try:
        pipeline = load("Flux", dtype="bfloat16", attention_backend=backend)
    except ConfigurationError:
        assert backend not in RUN_EVERYWHERE
        return
    check_threads(pipeline)


# Quantization.


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_quantized_denoiser_makes_about_the_same_picture(load, device, quantization):
    pytest.importorskip("torchao")
    plain = load("Flux", dtype="bfloat16")
    with capture_logs() as logs:
        pipeline = load("Flux", dtype="bfloat16", quantization=quantization)
    if quantization == "fp8":
        capability = torch.cuda.get_device_capability(device)
        weights_only = any(line["event"] == "fp8 weights only" for line in logs)
        assert weights_only == (capability < FP8_CAPABILITY)
    assert 0 < mean(alone(plain, REQUESTS[0]), alone(pipeline, REQUESTS[0])) < 0.1


# CUDA graphs.


@pytest.mark.parametrize("name", NAMES)
def test_replayed_pictures_are_the_same(load, name):
    plain, graphed = load(name), load(name, cuda_graphs=True)
    forward = acceleration.denoiser_of(graphed.family.pipe).forward
    expected = {request.seed: served_alone(plain, request, bucket=4) for request in REQUESTS}
    for _ in range(2):
        pictures, _ = serve(graphed, ARRIVALS, bucket=4)
        for request in REQUESTS:
            assert expected[request.seed].miss(pictures[request.seed]) <= 1
    if name in ("Flux", "SD3", "SDXL"):
        assert len(forward.graphs) == 1


def test_recording_while_another_thread_decodes(load):
    pipeline = load("Flux", cuda_graphs=True)
    finished = begin(pipeline, ask(width=512, height=512, steps=1))
    pipeline.step([finished])
    expected = Reference(
        lambda copies: torch.stack([pipeline.decode([finished])[0] for _ in range(copies)]),
        modules_of(pipeline.family.pipe),
    )
    assert expected.allowed < 1e-2  # draws the reference while nothing else runs
    stop, decoded = threading.Event(), []

    def decode():
        while not stop.is_set():
            decoded.extend(pipeline.decode([finished]))

    thread = threading.Thread(target=decode)
    thread.start()
    try:
        pictures = {width: alone(pipeline, ask(width=width)) for width in range(64, 256, 16)}
    finally:
        stop.set()
        thread.join()
    assert decoded
    assert all(expected.miss(picture) <= 1 for picture in decoded)
    for width, picture in pictures.items():
        assert torch.equal(picture, alone(pipeline, ask(width=width)))
    assert acceleration.denoiser_of(pipeline.family.pipe).forward.graphs


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_pictures_are_the_same_on_a_second_device(tiny_folder, load):
    """Every thread's current device is initially the first one."""
    fields = {"defaults": SMALL, "max_sequence_length": length_of("Flux"), "cuda_graphs": True}
    expected = served_alone(load("Flux"), REQUESTS[0])
    pipeline = load_pipeline(entry(tiny_folder("Flux"), **fields), "cuda:1")
    pictures = []
    thread = threading.Thread(target=lambda: pictures.append(alone(pipeline, REQUESTS[0])))
    thread.start()
    thread.join()
    assert acceleration.denoiser_of(pipeline.family.pipe).forward.graphs
    assert expected.miss(pictures[0]) <= 1


def test_unrecordable_passes_run_without_a_graph(load):
    pipeline = load("Flux", cuda_graphs=True)
    transformer = acceleration.denoiser_of(pipeline.family.pipe)
    forward = transformer.forward.forward

    def waiting(*arguments, **named):
        named["hidden_states"].sum().item()  # the host waits for the device
        return forward(*arguments, **named)

    transformer.forward.forward = waiting
    with capture_logs() as logs:
        picture = alone(pipeline, REQUESTS[0])
    assert [line["event"] for line in logs] == ["no CUDA graph for a shape; it runs without"]
    assert served_alone(load("Flux"), REQUESTS[0]).miss(picture) <= 1
