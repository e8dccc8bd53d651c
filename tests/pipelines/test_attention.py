"""The attention kernel: torch's choice, or the catalog's if it works."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event
from types import FunctionType
from unittest.mock import Mock

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch.overrides import TorchFunctionMode

from jobs.catalog import Defaults
from jobs.errors import ConfigurationError, OutOfMemory
from pipelines.acceleration import denoiser_of, run_once
from pipelines.attention import CUDNN, choose_attention, sets_process_flags
from pipelines.fair_lock import FairLock
from pipelines.families import make_family
from pipelines.load import load_pipeline
from pipelines.placements.family_pipeline import FamilyPipeline
from tests.pipelines.rounding import served_alone
from tests.pipelines.serving import alone, ask, begin, entry
from tests.waiting import PATIENCE, wait_until

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SMALL = {"defaults": Defaults(64, 64, 2, 3.5), "max_sequence_length": 48}


def backends(denoiser) -> set[AttentionBackendName | None]:
    processors = (getattr(module, "processor", None) for module in denoiser.modules())
    return {p._attention_backend for p in processors if hasattr(p, "_attention_backend")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_chooses_the_kernel_by_default_on_every_device(tiny_pipe, monkeypatch, dtype):
    monkeypatch.setattr("torch.backends.cudnn.is_available", lambda: True)
    transformer = tiny_pipe("Flux").transformer.to(dtype)
    for device in (CPU, CUDA):
        choose_attention(transformer, None, device, lambda: pytest.fail("tried"))
    assert backends(transformer) == {None}
    assert _AttentionBackendRegistry.get_active_backend()[0] == "native"


@pytest.mark.parametrize("backend", [None, "native"])
def test_a_default_set_in_the_environment_is_refused(tiny_pipe, monkeypatch, backend):
    """It would also hold for text encoders and autoencoders, which run on other threads."""
    monkeypatch.setattr("pipelines.attention.DIFFUSERS_ATTN_BACKEND", "_native_math")
    with pytest.raises(ConfigurationError, match=r"DIFFUSERS_ATTN_BACKEND=_native_math.*unset it"):
        choose_attention(None, backend, CPU, lambda: pytest.fail("tried"))


def test_running_out_of_memory_in_the_trial_does_not_disqualify_a_kernel(tiny_pipe):
    def full() -> None:
        raise OutOfMemory("no memory")

    with pytest.raises(OutOfMemory):
        choose_attention(tiny_pipe("Flux").transformer, "native", CPU, full)


# Process-wide flags.


def test_backends_that_set_process_flags_are_recognized():
    names = {backend.value for backend in AttentionBackendName}
    assert {name for name in names if sets_process_flags(name)} == {
        "_native_cudnn",
        "_native_efficient",
        "_native_flash",
        "_native_math",
    }


def test_a_helper_that_sets_flags_is_recognized(monkeypatch):
    helper = FunctionType(compile("torch.nn.attention.sdpa_kernel(0)", "", "eval"), {})
    attend = FunctionType(compile("[helper() for _ in range(2)]", "", "eval"), {"helper": helper})
    monkeypatch.setitem(_AttentionBackendRegistry._backends, "new", attend)
    assert sets_process_flags("new")


class FlagsSeen(TorchFunctionMode):
    """Records which attention kernels are enabled whenever torch runs attention."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.seen.add(switched_on())
        return function(*args, **(kwargs or {}))


def switched_on():
    cuda = torch.backends.cuda
    kernels = (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled)
    return tuple(kernel() for kernel in kernels)


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash"])
def test_the_recognized_flags_match_the_observed_ones(tiny_folder, backend):
    pipeline = load_pipeline(entry(tiny_folder("Flux"), attention_backend=backend, **SMALL), "cpu")
    sample, before = begin(pipeline, ask()), switched_on()
    with FlagsSeen() as flags:
        pipeline.step([sample])
    assert (flags.seen != {before}) is sets_process_flags(backend)
    assert switched_on() == before


@pytest.mark.parametrize("backend", [None, "native", "_native_math"])
def test_verbs_run_one_at_a_time_only_with_such_a_backend(tiny_folder, monkeypatch, backend):
    pipeline = load_pipeline(entry(tiny_folder("Flux"), attention_backend=backend, **SMALL), "cpu")
    finished = begin(pipeline, ask(steps=1))
    pipeline.step([finished])
    other, order, inside, leave = begin(pipeline, ask(seed=2)), [], Event(), Event()
    step, decode = pipeline.family.step, pipeline.family.decode

    def slow_step(samples, bucket=0):
        inside.set()
        assert leave.wait(PATIENCE)
        step(samples, bucket)
        order.append("step")

    def noted_decode(sample):
        order.append("decode")
        return decode(sample)

    monkeypatch.setattr(pipeline.family, "step", slow_step)
    monkeypatch.setattr(pipeline.family, "decode", noted_decode)
    waits = backend == "_native_math"
    with ThreadPoolExecutor(2) as pool:
        stepping = pool.submit(pipeline.step, [other])
        try:
            assert inside.wait(PATIENCE)
            decoding = pool.submit(pipeline.decode, [finished])
            wait_until(lambda: pipeline._turn.waiting == 1 if waits else decoding.done())
        finally:
            leave.set()
        stepping.result()
        decoding.result()
    assert order == (["step", "decode"] if waits else ["decode", "step"])


def test_the_lock_is_first_come_first_served():
    lock, order = FairLock(), []

    def take(number):
        with lock:
            order.append(number)

    with ThreadPoolExecutor(5) as pool:
        with lock:
            futures = []
            for number in range(5):
                futures.append(pool.submit(take, number))
                wait_until(lambda: lock.waiting == len(futures))
        for future in futures:
            future.result()
    assert order == list(range(5))


def test_an_interrupted_wait_for_the_lock_does_not_block_others(monkeypatch):
    lock = FairLock()
    with lock:
        with monkeypatch.context() as patch:
            patch.setattr(lock._changed, "wait_for", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt), lock:
                pytest.fail("got in")
        assert lock.waiting == 0
    with lock:
        assert lock.waiting == 0


# The catalog's backend.


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
        ("Flux", CUDNN, "doesn't run here: No viable backend"),
        ("SD15", "native", "UNet2DConditionModel doesn't support backends"),
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
    """The trial finds kernels that don't support masks."""
    pipeline = FamilyPipeline(make_family(tiny_pipe("QwenImage"), None))
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


def test_the_trial_passes_if_two_samples_do_not_fit(tiny_pipe, monkeypatch):
    pipeline = FamilyPipeline(make_family(tiny_pipe("Flux"), 48))
    step = pipeline.family.step

    def limited(samples, bucket=0):
        if len(samples) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(samples, bucket)

    monkeypatch.setattr(pipeline.family, "step", limited)
    run_once(pipeline, entry("x", **SMALL))
