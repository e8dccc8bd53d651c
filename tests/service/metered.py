"""A worker on a fake device on which every forward pass takes the same time, by its own clock.

Takes the arguments of `python -m workers`. The clock only advances with forward passes, so a busy
machine doesn't affect any measurement. For prompts that start with the word NAME, the worker runs
as many steps, over all samples, as the data folder's file NAME.allowed says. Then it touches
NAME.waiting and waits until the file allows more.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from pipelines.fake import FakePipeline
from pipelines.seam import Sample
from workers import __main__, metrics, slots
from workers.process import worker

PASS_SECONDS = 0.05
REAL_SECONDS = 0.02
LARGEST_BATCH = 8


class Metered(FakePipeline):
    """Like an accelerator: up to eight samples take the time of one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(PASS_SECONDS, largest_batch=LARGEST_BATCH, sleep=self._pass_time)
        self.now = time.monotonic()
        self._folder, self._steps = folder, Counter[str]()

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        name = samples[0].request.prompt.partition(" ")[0]
        while self._steps[name] >= self._allowed(name):
            (self._folder / f"{name}.waiting").touch()
            time.sleep(0.01)
        self._steps[name] += len(samples)
        super().step(samples, bucket)

    def _allowed(self, name: str) -> float:
        path = self._folder / f"{name}.allowed"
        return float(path.read_text() or 0) if path.exists() else float("inf")

    def _pass_time(self, seconds: float) -> None:
        time.sleep(REAL_SECONDS)
        self.now += seconds


if __name__ == "__main__":
    pipeline = Metered(Path(os.environ["IMAGEMILL_DATA"]))
    for module in (metrics, slots):
        module.time = SimpleNamespace(monotonic=lambda: pipeline.now)  # type: ignore[assignment]
    worker.load_pipeline = lambda model, device: pipeline  # type: ignore[assignment]
    sys.exit(__main__.main())
