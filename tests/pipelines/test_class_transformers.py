"""Classes of `classes/transformers.py`, called whole twice: the class's own picture, bit by bit."""

import pytest

from tests.pipelines.classes.guard import check_class
from tests.pipelines.classes.transformers import BUILDERS

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi's own
]


@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_served_is_the_picture_of_the_class(name):
    check_class(name, BUILDERS[name])
