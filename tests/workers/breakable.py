"""A worker process whose group one image breaks; `test_ends.py` runs it.

Arguments: the queue server's address, the data folder, the model's folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.errors import GroupLost
from jobs.queue.store import Store
from pipelines.fake import FakePipeline
from pipelines.seam import Sample
from tests.pipelines.serving import entry
from workers.process import worker
from workers.process.launch import Place
from workers.settings import WorkerSettings

LEASE_SECONDS = 3600
"""So long that a slow heartbeat loses none; the test expires those of a dead process."""


class Breakable(FakePipeline):
    """A fake whose group is lost in every forward pass with a poisonous prompt."""

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        if any(sample.request.prompt == "poison" for sample in samples):
            raise GroupLost("rank 1 is out of memory")
        super().step(samples, bucket)


if __name__ == "__main__":
    url, data, folder = sys.argv[1:]
    worker.load_pipeline = lambda model, device: Breakable()  # type: ignore[assignment]
    settings = WorkerSettings(data=Path(data), lease_seconds=LEASE_SECONDS)
    process = worker.Worker(
        model=entry(Path(folder)), place=Place("cpu"), settings=settings, store=Store.connect(url)
    )
    code = process.run()
    assert "diffusers" not in sys.modules, "only real models need it, and importing it is slow"
    sys.exit(code)
