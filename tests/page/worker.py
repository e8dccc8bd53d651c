"""A worker on a fake model that can be paused: `python -m tests.page.worker`.

Takes the arguments of `python -m workers`. An image with [hold] in its prompt stays at half of its
steps while the data folder has a file `hold`, so a test can inspect a running image.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipelines.fake import FakePipeline
from pipelines.seam import Sample
from workers import __main__
from workers.process import worker

STEP_SECONDS = 0.05


class Holding(FakePipeline):
    """Its loop continues while images are held, so their previews are drawn."""

    def __init__(self, hold: Path) -> None:
        super().__init__(STEP_SECONDS)
        self._hold = hold

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        free = [sample for sample in samples if not self._is_held(sample)]
        if free:
            super().step(free, bucket)
        else:
            time.sleep(STEP_SECONDS)

    def _is_held(self, sample: Sample) -> bool:
        is_half_way = sample.step == sample.steps // 2
        return is_half_way and "[hold]" in sample.request.prompt and self._hold.exists()


if __name__ == "__main__":
    pipeline = Holding(Path(os.environ["IMAGEMILL_DATA"]) / "hold")
    worker.load_pipeline = lambda model, device: pipeline  # type: ignore[assignment]
    sys.exit(__main__.main())
