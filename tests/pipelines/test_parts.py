"""Small modules: the embedding cache, out-of-memory errors, the forward batch."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from jobs.errors import ConfigurationError, OutOfMemory
from pipelines import batch
from pipelines.cache import EmbeddingCache
from pipelines.out_of_memory import is_out_of_memory, reports_out_of_memory
from pipelines.seam import Conditioning
from pipelines.text import TokenCounter, sequence_length
from tests.pipelines.serving import ask
from tests.pipelines.tiny_parts import chat_tokenizer


def embeddings(kilobytes: int) -> Conditioning:
    return Conditioning({"prompt_embeds": torch.zeros(1, kilobytes * 256)})


def test_the_cache_evicts_the_least_recently_used_entry():
    cache = EmbeddingCache(max_bytes=3 * 1024)
    cached = {name: cache.get("positive", name, lambda: embeddings(1)) for name in "abc"}
    assert cache.get("positive", "a", lambda: embeddings(9)) is cached["a"]
    cache.get("positive", "d", lambda: embeddings(1))
    assert (len(cache), cache.size, cache.hits, cache.misses) == (3, 3 * 1024, 1, 4)
    assert cache.get("positive", "a", lambda: embeddings(9)) is cached["a"]
    assert cache.get("positive", "b", lambda: embeddings(1)) is not cached["b"]


def test_the_cache_separates_roles_and_skips_large_entries():
    cache = EmbeddingCache(max_bytes=1024)
    positive = cache.get("positive", "", lambda: embeddings(1))
    assert cache.get("negative", "", lambda: embeddings(1)) is not positive
    assert cache.get("positive", "long", lambda: embeddings(2)).size == 2048
    assert (len(cache), cache.size) == (1, 1024)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_errors_are_recognized(error, expected):
    assert is_out_of_memory(error) is expected


def test_out_of_memory_is_one_line_and_keeps_no_tensors_alive():
    @reports_out_of_memory
    def allocate():
        return torch.empty(10**15)

    with pytest.raises(OutOfMemory) as caught:
        allocate()
    assert "\n" not in str(caught.value)
    assert caught.value.__context__ is None


def sample_on(scheduler, seed=1, steps=6):
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 4, 4, 4, generator=generator) * scheduler.init_noise_sigma
    return batch.new_sample(ask(seed=seed), Conditioning({}), latents, scheduler, generator)


SCHEDULERS = {
    "PNDM": partial(PNDMScheduler, skip_prk_steps=True),
    "Heun": HeunDiscreteScheduler,
    "DPM++": DPMSolverMultistepScheduler,
    "DPM++ SDE": partial(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"),
    "UniPC": UniPCMultistepScheduler,
    "Euler ancestral": EulerAncestralDiscreteScheduler,
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_failed_step_does_not_change_the_schedulers(name):
    """Multistep histories and noise generators mustn't change, even if a later sample fails."""
    scheduler = SCHEDULERS[name]()
    plain, disturbed, broken = (sample_on(scheduler, seed) for seed in (1, 1, 2))
    for _ in range(plain.steps):
        predicted = batch.latents([plain], guided=False, scaled=True) * 0.3
        batch.advance([plain], [predicted])
        batch.latents([disturbed], guided=False, scaled=True)
        with pytest.raises(RuntimeError):
            batch.advance([disturbed, broken], [predicted, torch.zeros(1, 3, 3, 3)])
        batch.advance([disturbed], [predicted])
    assert plain.done
    assert disturbed.done
    assert broken.step == 0
    assert torch.equal(plain.latents, disturbed.latents)


def test_padding_repeats_samples_and_drops_none():
    samples = [sample_on(PNDMScheduler(), seed) for seed in (1, 2, 3)]
    assert batch.padded(samples, 0) == samples
    assert batch.padded(samples, 2) == samples
    assert [s.request.seed for s in batch.padded(samples, 8)] == [1, 2, 3, 1, 2, 3, 1, 2]


def test_tokens_are_counted_while_another_thread_truncates():
    """With a shared tokenizer, each would sometimes see the other's truncation."""
    tokenizer = chat_tokenizer()
    count = TokenCounter(tokenizer)
    texts = [f"{number} " + "word " * 800 for number in range(100)]

    def truncate() -> set[int]:
        cut = {"padding": "max_length", "truncation": True, "max_length": 48}
        return {len(tokenizer(text, **cut).input_ids) for text in texts}

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as thread:
            truncated = thread.submit(truncate)
            counts = [count(text) for text in texts]
    finally:
        sys.setswitchinterval(interval)
    assert truncated.result() == {48}
    assert counts == [len(text) for text in texts]


def test_a_sequence_length_is_the_catalogs_or_the_default():
    assert sequence_length(None, default=256, largest=512) == 256
    assert sequence_length(77, default=256, largest=512) == 77
    with pytest.raises(ConfigurationError, match="1 to 512, not 513"):
        sequence_length(513, default=256, largest=512)
