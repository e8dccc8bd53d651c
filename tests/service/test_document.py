"""Schemathesis on the OpenAPI document: all responses must be as documented.

All of its checks run. `refusals.py` lists why a request may be refused although it matches the
document.
"""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from jobs.reports import WorkerReport
from jobs.runtime.embedded_queue import EmbeddedServer
from tests.service.conftest import deployed, working
from tests.service.live import listening

ROOT = Path(__file__).parents[2]
EXAMPLES = 12
"""Requests per operation and mode, in addition to those derived from the document."""


def test_answers_are_as_documented(server: EmbeddedServer, tmp_path: Path) -> None:
    with ExitStack() as stack:
        deployment = stack.enter_context(deployed(server.url, tmp_path / "data", start=False))
        address = stack.enter_context(listening(deployment.client.app))
        deployment.store.register("w1", WorkerReport("demo", "ready"), 600)
        for model in ("demo", "distilled", "idle"):
            stack.enter_context(working(deployment, model=model))
        done = subprocess.run(
            [
                Path(sys.executable).with_name("schemathesis"),
                "run",
                f"{address}/openapi.json",
                *("--checks", "all", "--phases", "examples,coverage,fuzzing"),
                *("--max-examples", str(EXAMPLES), "--generation-database", "none"),
                "--continue-on-failure",
            ],
            env=os.environ
            | {"SCHEMATHESIS_HOOKS": "tests.service.refusals", "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout + done.stderr
