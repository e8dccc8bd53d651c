"""Every family's real pipeline under the real engine, with other requests arriving at any time.

A reproducible image is bit-equal to the same request served alone; a fast one differs by rounding
only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jobs.request import ImageRequest
from pipelines.families.whole_call import WholeCall
from pipelines.load import load_pipeline
from pipelines.placements.family_pipeline import FamilyPipeline
from pipelines.seam import Sample
from tests.pipelines.rounding import Reference, modules_of
from tests.pipelines.serving import ask, entry
from tests.pipelines.tiny import BUILDERS, save_tiny
from tests.pipelines.tiny_whole import cogview4
from tests.workers.conftest import Bench
from workers.in_flight import InFlight
from workers.profile import measure
from workers.rehearsal import largest_with_same_bits
from workers.scheduler import BUCKETS, Costs

# numpy 2 warns about a call in diffusers' schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LENGTHS = {"QwenImage": 320, "Flux2": 320, "SD15": None, "SDXL": None}
"""max_sequence_length of the families that can't run with 48."""

SECONDS = (1.0, 1.2, 1.45, 2.2, 4.2, 8.3)
"""Per forward pass, by bucket: these pin a usual sample to 4, a small one to 8."""

REQUESTS = st.builds(
    ask,
    prompt=st.sampled_from(["x", "a red cat", "a bad dog", "a cat that runs on a beach at dawn"]),
    steps=st.integers(1, 4),
    guidance_scale=st.sampled_from([1.0, 2.5, 6.0]),
    negative_prompt=st.sampled_from([None, "", "ugly", "low quality, blurry"]),
    width=st.sampled_from([64, 64, 96]),
    reproducible=st.booleans(),
)
ARRIVALS = st.lists(st.tuples(st.integers(0, 5), REQUESTS), min_size=3, max_size=6)
"""Requests, each with the number of forward passes before it arrives."""


@dataclass
class Arriving(Bench):
    """An engine that gets requests while it runs, and at once when it would be idle."""

    later: list[tuple[int, ImageRequest]] = field(default_factory=list)
    passes: int = 0

    def serve(self, arrivals: Sequence[tuple[int, ImageRequest]]) -> dict[int, torch.Tensor]:
        """The pictures by seed."""
        self.later = sorted(arrivals, key=lambda arrival: arrival[0])
        step = self.pipeline.step

        def counted(samples: Sequence[Sample], bucket: int = 0) -> None:
            step(samples, bucket)
            self.passes += 1
            self._arrive(self.passes)

        self.pipeline.step = counted
        try:
            self._arrive(self.later[0][0])
            self.run()
        finally:
            del self.pipeline.step
        assert not self.failed
        samples = [flight.sample for flight in self.delivered]
        return {sample.request.seed: self.pipeline.decode([sample])[0] for sample in samples}

    def _arrive(self, now: int) -> None:
        while self.later and self.later[0][0] <= now:
            self.enqueue(self.later.pop(0)[1])

    def _left(self, flight: InFlight) -> None:
        if self.later and len(self.delivered) + len(self.failed) == len(self.flights):
            self._arrive(self.later[0][0])
        super()._left(flight)


def served_alone(pipeline, costs: Costs, request: ImageRequest) -> Reference:
    """The picture of the same engine without other requests."""

    def draw(copies: int) -> torch.Tensor:
        serve = Arriving(pipeline, costs).serve
        return torch.stack([serve([(0, request)])[request.seed] for _ in range(copies)])

    return Reference(draw, modules_of(pipeline.family.pipe))


def costs_of(pipeline) -> Costs:
    """Costs of a device on which batches pay up to a point."""
    usual = pipeline.rows(ask()) * pipeline.tokens(ask())
    return Costs(tuple((usual * b, s) for b, s in zip(BUCKETS, SECONDS, strict=True)))


@cache
def same_bits(pipeline) -> dict[str, int]:
    """As the warm-up finds it, for every shape in REQUESTS."""
    requests = [ask(width=width, guidance_scale=g) for width in (64, 96) for g in (1.0, 6.0)]
    if not pipeline.card.joins:
        return {}
    return {
        repr(pipeline.batch_key(request)): largest_with_same_bits(pipeline, request, 8)
        for request in requests
    }


@pytest.fixture(scope="module", params=[*BUILDERS, "CogView4"])
def pipeline(request, tmp_path_factory):
    torch.set_num_threads(1)
    if request.param == "CogView4":
        return FamilyPipeline(WholeCall(cogview4()))
    folder = save_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param)
    length = LENGTHS.get(request.param, 48)
    return load_pipeline(entry(folder, max_sequence_length=length), "cpu")


@settings(
    max_examples=12,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(arrivals=ARRIVALS, is_compared=st.booleans())
def test_other_images_never_change_a_reproducible_one(pipeline, arrivals, is_compared):
    """In the pinned bucket, or in any bucket that gives the same bits here."""
    costs = costs_of(pipeline)
    if is_compared:
        costs = replace(costs, same_bits=same_bits(pipeline))
    seeded = [(at, replace(request, seed=seed)) for seed, (at, request) in enumerate(arrivals)]
    pictures = Arriving(pipeline, costs).serve(seeded)
    for _, request in seeded:
        alone = served_alone(pipeline, costs, request)
        if request.reproducible:
            assert torch.equal(pictures[request.seed], alone.picture), request
        else:
            assert alone.miss(pictures[request.seed]) <= 1, request


def test_pipeline_without_batches_is_measured_and_served(monkeypatch):
    pipe = cogview4()
    check = pipe.check_inputs

    def one_only(prompt, *arguments, **named):
        if not isinstance(prompt, str) and len(prompt) > 1:
            raise ValueError("one prompt at a time")
        return check(prompt, *arguments, **named)

    monkeypatch.setattr(pipe, "check_inputs", one_only)
    pipeline = FamilyPipeline(WholeCall(pipe))
    assert measure(pipeline, ask(steps=2)).points
    requests = [ask("a red cat", seed=seed, steps=2, reproducible=seed < 2) for seed in range(4)]
    assert len({pipeline.batch_key(request) for request in requests}) == len(requests)
    pictures = Arriving(pipeline, costs_of(pipeline)).serve([(0, request) for request in requests])
    for request in requests:
        alone = Arriving(pipeline, costs_of(pipeline)).serve([(0, request)])[request.seed]
        assert torch.equal(pictures[request.seed], alone)
