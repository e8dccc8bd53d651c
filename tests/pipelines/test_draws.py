"""Random numbers drawn without a generator depend only on the seed, not on other threads."""

import threading
from collections.abc import Iterator

import diffusers as d
import pytest
import torch

from pipelines.draws import Draws, global_states
from pipelines.families.whole_call import WholeCall
from pipelines.placements.family_pipeline import FamilyPipeline
from tests.pipelines.serving import alone, ask, begin, serve
from tests.pipelines.tiny_whole import cogview4


def draw() -> list[torch.Tensor]:
    """One number from each kind of operation that pipelines use."""
    like = torch.zeros(4)
    return [
        torch.randn(4),
        torch.rand(4),
        torch.randint(100, (4,)),
        torch.randperm(9),
        torch.randn_like(like),
        torch.rand_like(like),
        like.clone().normal_(),
        like.clone().uniform_(),
        like.clone().exponential_(),
        torch.normal(like, 1.0),
        torch.bernoulli(like + 0.5),
        torch.multinomial(like + 1, 2),
    ]


@pytest.fixture
def noisy_neighbour() -> Iterator[None]:
    """A thread that constantly draws from the global generator."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            torch.rand(3)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    over.set()
    thread.join()


def test_a_seed_gives_the_same_numbers_whatever_other_threads_do(noisy_neighbour):
    rounds = []
    for seed in (1, 1, 2):
        with Draws(seed) as draws:
            rounds.append(draw())
        assert draws.count == len(rounds[-1])
    assert all(torch.equal(a, b) for a, b in zip(rounds[0], rounds[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(rounds[0][:3], rounds[2][:3], strict=True))


def test_the_global_generator_is_not_changed():
    before = global_states()
    with Draws(1):
        draw()
    assert global_states() == before
    torch.rand(1)
    assert global_states() != before


def test_the_numbers_equal_those_of_the_global_generator_with_that_seed():
    with Draws(5) as draws:
        drawn = draw()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draws.seed)
        assert all(torch.equal(a, b) for a, b in zip(drawn, draw(), strict=True))


def test_an_explicit_generator_is_used():
    with Draws(1) as draws:
        numbers = torch.randn(4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(numbers, torch.randn(4, generator=torch.Generator().manual_seed(7)))
    assert draws.count == 0


def test_operations_that_do_not_draw_are_not_counted():
    query = torch.randn(1, 2, 4, 8)
    with Draws(1) as draws:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
        torch.nn.functional.dropout(query, training=False)
    assert draws.count == 0


@pytest.fixture
def sampling():
    """CogView4 with a scheduler that draws noise, which gets no generator."""
    pipe = cogview4()
    pipe.scheduler = d.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    return pipe


def test_a_pipeline_that_draws_globally_makes_the_same_picture_each_time(sampling, noisy_neighbour):
    pipeline = FamilyPipeline(WholeCall(sampling))
    request = ask(seed=1)
    first = alone(pipeline, request)
    assert (pipeline.family.draws, pipeline.family.batches) == (True, False)
    assert torch.equal(first, alone(pipeline, request))
    pictures, calls = serve(pipeline, {0: [request, ask("a bad dog", seed=2)]}, bucket=4)
    assert calls == 2
    assert torch.equal(first, pictures[1])
    assert not torch.equal(first, alone(pipeline, ask(seed=3)))
    assert torch.equal(first, alone(FamilyPipeline(WholeCall(sampling)), request, bucket=4))


def test_a_first_batched_call_that_draws_is_split_into_single_calls(sampling):
    pipeline = FamilyPipeline(WholeCall(sampling))
    samples = [begin(pipeline, ask(seed=seed)) for seed in (1, 2)]
    pipeline.step(samples, bucket=2)
    assert pipeline.family.batches is False
    for sample in samples:
        [picture] = pipeline.decode([sample])
        assert torch.equal(picture, alone(FamilyPipeline(WholeCall(sampling)), sample.request))


def test_a_pipeline_that_does_not_draw_is_batched_despite_a_thread_that_draws(
    noisy_neighbour,
):
    pipeline = FamilyPipeline(WholeCall(cogview4()))
    first = alone(pipeline, ask(seed=1))
    assert not pipeline.family.draws
    assert torch.equal(first, alone(pipeline, ask(seed=1)))
