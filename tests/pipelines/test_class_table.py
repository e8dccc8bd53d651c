"""Every pipeline class of the installed diffusers is accounted for, so new ones are noticed."""

import diffusers
import pytest

from pipelines.families import check_class
from pipelines.families.whole_classes import refusal
from tests.pipelines.classes import catalogue, table
from tests.pipelines.classes.catalogue import UNBUILT, built, pipelines

# diffusers warns about some classes while importing them.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_every_class_is_tested_refused_or_listed_with_a_reason():
    unknown = [
        name
        for name, pipeline in pipelines().items()
        if not refusal(pipeline) and name not in built() and name not in UNBUILT
    ]
    assert not unknown, (
        f"diffusers {diffusers.__version__} has classes that no test knows: {', '.join(unknown)}. "
        "Build each tiny in tests/pipelines/classes, or refuse it in "
        "pipelines/families/whole_classes.py"
    )


def test_the_lists_only_name_supported_classes():
    supported = {name for name, pipeline in pipelines().items() if not refusal(pipeline)}
    assert set(built()) | set(UNBUILT) <= supported
    assert not set(built()) & set(UNBUILT)


def test_every_refused_class_is_refused_before_its_weights_are_loaded():
    for name, pipeline in pipelines().items():
        if sentence := refusal(pipeline):
            with pytest.raises(Exception, match=name) as error:
                check_class(name)
            assert str(error.value) == sentence


def test_the_tables_only_name_classes_of_diffusers():
    for names in catalogue.tables():
        assert set(names) <= set(pipelines()), names


def test_the_table_in_the_docs_is_up_to_date():
    assert table.PATH.read_text(encoding="utf-8") == table.table(), (
        "run `python -m tests.pipelines.classes.table`"
    )
