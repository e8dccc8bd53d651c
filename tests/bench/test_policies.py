"""The policies on the fake pipeline: batches, the number of held images, failures."""

import pytest
import torch

from bench.policies import Arrival, Policy, decoding_aside, one_at_a_time, stepwise, whole_calls
from bench.saturated import flops
from jobs.request import ImageRequest
from pipelines.fake import FakePipeline
from pipelines.seam import Sample
from workers.in_flight import InFlight, InFlightImages
from workers.scheduler import Costs

NO_BATCHES = Costs(((64, 1.0), (128, 2.0)))
"""A forward pass over two samples takes twice as long, so a worker holds the fewest."""


def _trace(count: int, prompt: str = "a ring") -> list[Arrival]:
    return [
        Arrival(0.0, ImageRequest("fake", prompt, seed, 128, 128, 2 + seed % 2, 1.0))
        for seed in range(count)
    ]


@pytest.mark.parametrize("policy", [stepwise, one_at_a_time, decoding_aside, whole_calls])
def test_every_request_is_denoised_whole_and_timed(policy: Policy) -> None:
    pipeline, trace = FakePipeline(), _trace(20)
    latencies = policy(pipeline, NO_BATCHES, trace)
    seeds = [seed for call in pipeline.calls for seed in call]
    assert all(seeds.count(arrival.request.seed) == arrival.request.steps for arrival in trace)
    assert len(latencies) == len(trace)
    assert min(latencies) > 0


def test_our_engine_holds_no_more_than_a_worker_would(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    add = InFlightImages.add

    def counted(flights: InFlightImages, flight: InFlight) -> None:
        add(flights, flight)
        held.append(len(flights))

    monkeypatch.setattr(InFlightImages, "add", counted)
    stepwise(FakePipeline(seconds_per_step=0.005), NO_BATCHES, _trace(40))
    assert max(held) == 2 * NO_BATCHES.held(64)


class _NoDecoder(FakePipeline):
    def decode(self, samples: list[Sample]) -> list[torch.Tensor]:
        raise RuntimeError("no decoder")


@pytest.mark.parametrize("policy", [stepwise, one_at_a_time, decoding_aside])
def test_an_image_that_fails_ends_the_comparison(policy: Policy) -> None:
    with pytest.raises(RuntimeError):
        policy(_NoDecoder(), NO_BATCHES, _trace(20))


def test_attention_flops_match_the_formula() -> None:
    batch, heads, queries, keys, width = 2, 3, 5, 7, 8
    q = torch.randn(batch, heads, queries, width)
    k = v = torch.randn(batch, heads, keys, width)
    products = 2 * batch * heads * queries * keys * width  # scores; and as many for the values
    counted = flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert counted == 2 * products
