"""Which options go together, without a model; tests/imagemill/test_plan_options.py has the rest."""

import pytest

from jobs.errors import ConfigurationError
from jobs.options import LAYOUT, PLACEMENTS, RULES, check_options, refusal
from pipelines.placements import PLACEMENTS as LOADERS

OPTIONS = {rule.option for rule in RULES}


def test_every_placement_has_a_loader():
    assert set(LOADERS) == set(PLACEMENTS)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_names_known_options_and_one_condition(rule):
    assert [bool(rule.placements), rule.stepped is not None, bool(rule.without)].count(True) == 1
    assert set(rule.placements) <= set(PLACEMENTS) and set(rule.without) <= OPTIONS
    assert set(LAYOUT) <= OPTIONS


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_entry_without_options_is_accepted(placement):
    assert refusal(placement, ()) is None
    assert refusal(placement, (), True) is None


def test_what_depends_on_the_model_is_refused_once_its_class_is_known():
    assert refusal("split", {"unload"}) is None
    assert refusal("split", {"unload"}, True) is None
    with pytest.raises(
        ConfigurationError,
        match=r"^unload requires a model that's stepped, but APipeline is called whole: a whole",
    ):
        check_options("split", {"unload"}, "APipeline", stepped=False)
    with pytest.raises(
        ConfigurationError,
        match=r"^cache requires a model that's called whole, but BPipeline is stepped: a cache",
    ):
        check_options("replica", {"cache"}, "BPipeline", stepped=True)


def test_without_a_placement_only_the_other_rules_hold():
    assert refusal(None, {"cache"}) is None
    rule = refusal(None, {"compile", "unload"})
    assert rule is not None and rule.option == "compile"
