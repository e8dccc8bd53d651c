"""The self-check: what passes, and the errors for what doesn't."""

import pytest
import torch
from diffusers import attention_backend

from jobs.catalog import Defaults
from jobs.errors import ConfigurationError
from pipelines.families import make_family
from pipelines.placements.family_pipeline import FamilyPipeline
from pipelines.placements.verify import compare, record
from tests.pipelines.serving import entry

SMALL = Defaults(64, 48, 2, 3.5)


@pytest.fixture
def pipe(tiny_pipe):
    return tiny_pipe("QwenImage")


@pytest.fixture
def references(pipe):
    return record(FamilyPipeline(make_family(pipe, 320)), entry("", defaults=SMALL))


class Changed(torch.nn.Module):
    """A transformer with a changed output."""

    def __init__(self, behind, change):
        super().__init__()
        self.behind, self.change = behind, change

    def forward(self, *args, **kwargs):
        return (self.change(self.behind(*args, **kwargs)[0]),)


def test_unguided_and_masked_guided_passes_are_recorded(pipe, references):
    assert [len(reference.output) for reference in references.passes] == [1, 2]
    mask = references.passes[1].kwargs["encoder_hidden_states_mask"]
    assert mask[0].sum() != mask[1].sum()
    assert references.passes[0].kwargs["img_shapes"] == [[(1, 3, 4)]]
    assert type(pipe.transformer).__name__ == "QwenImageTransformer2DModel"


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x + 1e-6])
def test_rounding_passes(pipe, references, change):
    compare(references, Changed(pipe.transformer, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 1.01, r"in row 1 of 1 its output differs .* by 0\.01 of its norm"),
        (lambda x: x.roll(1, 1), "differs from the whole one's"),
        (lambda x: x * float("nan"), "by nan of its norm, but rounding in .*32 allows only 0.0001"),
        (
            lambda x: x[:, :-1],
            r"returns 1 rows of shape \[\(11, 16\)\] instead of 1 of \[\(12, 16\)\]",
        ),
        (lambda x: x if len(x) == 1 else x.flip(0), "in row 1 of 2"),
        (lambda x: torch.stack([*x[:1], *x[1:] * 1.001]), "in row 2 of 2"),
    ],
)
def test_larger_differences_are_refused(pipe, references, change, message):
    with pytest.raises(ConfigurationError, match=message):
        compare(references, Changed(pipe.transformer, change))


@pytest.mark.parametrize("name", ["Flux", "QwenImage", "ZImage"])
def test_half_precision_tolerance_is_the_measured_rounding(tiny_pipe, name):
    """Another kernel's rounding passes, but a change of a few per cent doesn't."""
    pipe = tiny_pipe(name).to(torch.bfloat16)
    references = record(FamilyPipeline(make_family(pipe, 320)), entry("", defaults=SMALL))
    measured = [rounding for recorded in references.passes for rounding in recorded.rounding]
    assert min(measured) > 1e-3
    assert max(measured) < 3e-2
    with attention_backend("_native_math"):
        compare(references, pipe.transformer)
    with pytest.raises(ConfigurationError, match=r"rounding in torch.bfloat16 allows only 0\.0"):
        compare(references, Changed(pipe.transformer, lambda x: [row * 1.05 for row in x]))
    assert not any(module._forward_hooks for module in pipe.transformer.modules())


def test_transformer_runs_where_it_was_loaded(pipe):
    pipeline = FamilyPipeline(make_family(pipe, 320))
    model = entry("", defaults=Defaults(32, 32, 2, 3.5))
    place = torch.device("cpu")
    references = record(pipeline, model, place, place)
    assert all(t.device == place for recorded in references.passes for t in recorded.output)
