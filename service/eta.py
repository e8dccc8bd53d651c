"""When a job will be done, from the rates that live workers measured. Pure arithmetic.

An image ahead in the queue is taken to cost what the job's own images cost on average: the queue
knows how many they are, not how large.
"""

from collections.abc import Iterable, Sequence

from jobs.job import ImageView, State
from jobs.views import Ahead, WorkerInfo


def steps_per_second(workers: Iterable[WorkerInfo], model: str) -> float:
    """Denoising steps a second that the ready workers of a model make together, 0 if unknown."""
    rates = (
        worker.info.get("steps_per_second")
        for worker in workers
        if worker.info.get("model") == model and worker.info.get("state") == "ready"
    )
    return sum(float(rate) for rate in rates if isinstance(rate, int | float) and rate > 0)


def eta_seconds(images: Sequence[ImageView], ahead: Ahead | None, rate: float) -> float | None:
    """Seconds until the last of a job's `images` is made; `ahead` as the store tells it.

    `rate` is denoising steps a second. None when the rate is unknown; 0 when nothing is left.
    """
    left = [image.request.steps - image.step for image in images if not image.state.finished]
    if not left:
        return 0.0
    if rate <= 0:
        return None
    mean = sum(image.request.steps for image in images) / len(images)
    own = sum(image.state is State.QUEUED for image in images)
    others = max(0, ahead.last - (own - 1)) if ahead else 0
    return round((sum(left) + others * mean) / rate, 1)
