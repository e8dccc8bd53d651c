"""The table of transformer classes, against diffusers' own classes."""

import inspect
from importlib import import_module

import diffusers
import pytest

from jobs.errors import ConfigurationError
from pipelines.placements.tensor_parallel import plan_of
from pipelines.placements.transformer_classes import (
    TRANSFORMERS,
    chain_of_class,
    parallel_plan_of,
)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_plan_names_arguments_of_the_forward_pass(name):
    plan = TRANSFORMERS[name].parallel
    if plan is None:
        return
    named = {*plan.rows, plan.text, plan.image, plan.mask} - {None}
    kind = getattr(diffusers, name)
    assert named <= set(inspect.signature(kind.forward).parameters)
    assert plan.heads in inspect.signature(kind.__init__).parameters
    assert plan.split or plan.unsplit or kind._cp_plan  # diffusers' own, else one of ours
    assert plan_of(kind)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_attention_with_a_mask_can_be_patched(name):
    module = import_module(getattr(diffusers, name).__module__)
    assert not TRANSFORMERS[name].masks or callable(module.dispatch_attention_fn)


def test_a_class_without_a_row_is_refused_by_name():
    with pytest.raises(ConfigurationError, match="no plan to split UNet2DConditionModel"):
        parallel_plan_of("UNet2DConditionModel")
    with pytest.raises(ConfigurationError, match="can't cut UNet2DConditionModel into stages"):
        chain_of_class("UNet2DConditionModel")


def test_a_row_without_the_fact_is_refused_by_name():
    with pytest.raises(ConfigurationError, match=r"no plan to split SD3Transformer2DModel; .*Flux"):
        parallel_plan_of("SD3Transformer2DModel")
    with pytest.raises(ConfigurationError, match="can't cut ChromaTransformer2DModel"):
        chain_of_class("ChromaTransformer2DModel")
