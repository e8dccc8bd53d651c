"""Serve the classes of `classes/transformers.py` twice; both pictures equal the class's."""

import pytest

from tests.pipelines.classes.guard import check_class
from tests.pipelines.classes.transformers import BUILDERS

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi's own
]


@pytest.mark.parametrize("name", BUILDERS)
def test_the_served_picture_is_the_class_own(name):
    check_class(name, BUILDERS[name])
