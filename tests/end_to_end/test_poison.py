"""A request that kills its worker, among seven others, in real worker processes."""

import json
from pathlib import Path

from imagemill.client.clients import Client
from jobs.job import State
from tests.end_to_end.deployment import up
from tests.waiting import PATIENCE, wait_until


def test_only_the_request_that_kills_its_worker_fails(tmp_path: Path) -> None:
    fake = tmp_path / "fake"
    fake.mkdir()
    index = {"_class_name": "FakePipeline", "options": {"seconds_per_step": 0.02}}
    (fake / "model_index.json").write_text(json.dumps(index))
    models = tmp_path / "models.toml"
    models.write_text(
        '[models.fake]\npath = "./fake"\nworkers = 1\n'
        "defaults = { width = 64, height = 64, steps = 4, guidance_scale = 1.0 }\n"
    )
    with (
        up(tmp_path / "data", models) as deployment,
        Client(deployment.url, patience=PATIENCE) as client,
    ):
        prompts = ["[kill]", *(f"fine {i}" for i in range(7))]
        job = client.submit("fake", prompts)

        def over() -> bool:
            if deployment.pid_of("worker") is None:
                deployment.expire_leases()
            return job.refresh().state.finished

        wait_until(over)
        assert job.state is State.FAILED
        assert (job.counts.succeeded, job.counts.failed) == (7, 1)
        [failed] = [image for image in job.images() if image.state is State.FAILED]
        assert failed.prompt == "[kill]"
        assert "worker" in str(failed.error)
