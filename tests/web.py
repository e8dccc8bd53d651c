"""httpx for tests: its own default gives up after five seconds, which a busy machine can take."""

from functools import partial

import httpx

from tests.waiting import PATIENCE

get = partial(httpx.get, timeout=PATIENCE)
post = partial(httpx.post, timeout=PATIENCE)
Client = partial(httpx.Client, timeout=PATIENCE)
