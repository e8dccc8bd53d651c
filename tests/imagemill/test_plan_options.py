"""Every option with every placement: the catalog and `imagemill plan` agree on what's refused."""

import tomllib
from copy import copy
from dataclasses import fields, replace
from pathlib import Path

import pytest

from jobs.catalog import Model, load_catalog
from jobs.errors import ConfigurationError
from jobs.options import LAYOUT, PLACEMENTS
from pipelines import families
from pipelines.loading.checkpoint import find_checkpoint
from pipelines.planner.case import Case
from pipelines.planner.skeleton import parts, skeletons
from pipelines.planner.survey import survey

DEMO = Path(__file__).parents[2] / "demo" / "model"
DEVICES = [80 * 10**9] * 4
VALUES = {
    "revision": '"main"',
    "variant": '"fp16"',
    "dtype": '"float32"',
    "workers": "2",
    "max_sequence_length": "77",
    "devices": '["cuda:0", "cuda:1", "cuda:2", "cuda:3"]',
    "max_memory": '{ cpu = "1GB" }',
    "unload": "true",
    "ring": "2",
    "ulysses": "2",
    "cfg": "2",
    "tensor": "2",
    "stages": "2",
    "chunks": "2",
    "attention_backend": '"native"',
    "compile": "true",
    "cuda_graphs": "true",
    "quantization": '"int8"',
    "cache": '"taylorseer"',
}
"""Option -> a value that isn't its default."""

ELSEWHERE = {"name", "path", "local", "placement", "defaults", "limits", "unset"}
ELSEWHERE |= {"config", "components", "aliases"}  # where the model is, and its further names
LEAST = {"context_parallel": ("cfg = 2",), "pipelined": ("stages = 2",)}
"""What an entry needs so that its group isn't one of one."""


@pytest.fixture(scope="module")
def case():
    model = Model("demo", str(DEMO), True, dtype="float32")
    checkpoint = find_checkpoint(model)
    modules = skeletons(model, checkpoint)
    return Case(model, modules, parts(modules, checkpoint, model), checkpoint, DEVICES, 10**12)


def entry(folder, placement, lines):
    """The catalog's model, or its refusal without the place."""
    least = [line for line in LEAST.get(placement, ()) if line not in lines]
    fields = [f'path = "{DEMO}"', f'placement = "{placement}"', *lines, *least]
    path = folder / "models.toml"
    path.write_text("\n".join(["[models.demo]", *fields]))
    try:
        return load_catalog(path).get("demo"), None
    except ConfigurationError as error:
        return None, str(error).removeprefix(f"{path}: models.demo.")


def test_every_option_is_walked():
    assert VALUES.keys() == {field.name for field in fields(Model)} - ELSEWHERE


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", VALUES)
def test_catalog_and_plan_refuse_with_the_same_sentence(
    tmp_path, case, monkeypatch, name, placement
):
    if name == "cache":
        monkeypatch.setattr(families, "FAMILIES", {})  # the demo's class as if called whole
    model, refused = entry(tmp_path, placement, [f"{name} = {VALUES[name]}"])
    assert (model is None) == bool(refused)
    assert plan_refusal(case, placement, name) == refused


def plan_refusal(case, placement, name):
    """The sentence with which the plan refuses the option; None if it accepts it.

    The plan chooses a placement's layout itself and takes all other options from the entry.
    """
    option = {name: value_of(name)}
    planned = copy(case)
    planned.model = case.model if name in LAYOUT else replace(case.model, **option)
    try:
        planned.model_for(placement, **option if name in LAYOUT else {})
    except ConfigurationError as error:
        return str(error)
    return None


def value_of(name):
    return tomllib.loads(f"value = {VALUES[name]}")["value"]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["tensor = 2", "ring = 2"], "tensor can't be combined with ring or ulysses: diffusers"),
        (["tensor = 2", "ulysses = 2"], "tensor can't be combined with ring or ulysses: diffusers"),
        (["compile = true", "unload = true"], "compile can't be combined with unload: every load"),
    ],
)
def test_options_that_exclude_each_other(tmp_path, case, lines, sentence):
    placement = "split" if "unload = true" in lines else "context_parallel"
    _, refused = entry(tmp_path, placement, lines)
    assert refused.startswith(sentence)
    with pytest.raises(ConfigurationError) as error:
        case.model_for(placement, **tomllib.loads("\n".join(lines)))
    assert str(error.value) == refused


@pytest.mark.parametrize("name", ["compile", "cuda_graphs", "quantization", "attention_backend"])
def test_the_report_refuses_by_the_table_and_keeps_the_option(case, tmp_path, name):
    model = replace(case.model, **{name: value_of(name)})
    report = survey(model, case.checkpoint, DEVICES, 10**12)
    for option in report.options:
        placement = option.name.partition(",")[0]
        lines = [f"{name} = {VALUES[name]}"]
        if option.name == "split, unload":
            lines.append("unload = true")
        _, refused = entry(tmp_path, placement, lines)
        if refused:
            assert (option.fits, option.arithmetic) == (False, refused)
        elif option.fits:
            assert f"{name} = {VALUES[name]}" in option.catalog
            path = tmp_path / "planned.toml"
            path.write_text(option.catalog)
            assert len(load_catalog(path)) == 1
    assert any(option.fits for option in report.options)


@pytest.mark.parametrize(("name", "stepped"), [("cache", True), ("cuda_graphs", False)])
def test_the_report_refuses_what_the_model_cannot_take(case, monkeypatch, name, stepped):
    if not stepped:
        monkeypatch.setattr(families, "FAMILIES", {})
    with pytest.raises(
        ConfigurationError, match=f"^{name} requires a model that's .* FluxPipeline"
    ):
        survey(replace(case.model, **{name: value_of(name)}), case.checkpoint, DEVICES, 10**12)
