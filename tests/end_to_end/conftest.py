"""One `imagemill up` for all tests that do not need their own: a start takes seconds."""

from collections.abc import Iterator

import pytest

from tests.end_to_end.mill import Mill, up
from tests.waiting import wait_until


@pytest.fixture(scope="session")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mill]:
    with up(tmp_path_factory.mktemp("data")) as mill:
        wait_until(mill.ready_workers)
        yield mill
