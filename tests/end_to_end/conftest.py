"""One `imagemill up`, shared by all tests that don't need their own, because it starts slowly.

It ends with this folder's last test, because its processes need some CPU time even when idle.
"""

from collections.abc import Iterator

import pytest

from tests.end_to_end.deployment import Deployment, up
from tests.waiting import wait_until


@pytest.fixture(scope="package")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with up(tmp_path_factory.mktemp("data")) as deployment:
        wait_until(deployment.ready_workers)
        yield deployment
