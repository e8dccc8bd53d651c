"""One `imagemill up`, shared by all tests that don't need their own, because it starts slowly."""

from collections.abc import Iterator

import pytest

from tests.end_to_end.deployment import Deployment, up
from tests.waiting import wait_until


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with up(tmp_path_factory.mktemp("data")) as deployment:
        wait_until(deployment.ready_workers)
        yield deployment
