"""When a job will be done, from the rates that live workers measured. Pure arithmetic.

An image ahead in the queue is taken to cost what the job's own images cost on average: the queue
knows how many they are, not how large.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jobs.job import ImageView, Job, State
from jobs.views import Ahead, WorkerInfo


def steps_per_second(workers: Iterable[WorkerInfo], model: str) -> float:
    """Denoising steps a second that the ready workers of a model make together, 0 if unknown."""
    rates = (
        worker.info.get("steps_per_second")
        for worker in workers
        if worker.info.get("model") == model and worker.info.get("state") == "ready"
    )
    return sum(float(rate) for rate in rates if isinstance(rate, int | float) and rate > 0)


@dataclass(frozen=True, slots=True)
class Work:
    """What is left of a job: steps to do, steps of an average image, images that wait."""

    left: float
    mean: float
    waiting: int
    is_over: bool


def work_of_images(images: Sequence[ImageView]) -> Work:
    """What is left of a job with these images, exactly."""
    unfinished = [image for image in images if not image.state.finished]
    return Work(
        left=sum(max(0, image.request.steps - image.step) for image in unfinished),
        mean=sum(image.request.steps for image in images) / len(images),
        waiting=sum(image.state is State.QUEUED for image in images),
        is_over=not unfinished,
    )


def work_of_counts(job: Job, sample: ImageView) -> Work:
    """What is left of a job, taking all its images to have as many steps as `sample`."""
    steps = sample.request.steps
    left = (1 - job.progress) * job.counts.total * steps
    return Work(left, steps, job.counts.queued, job.state.finished)


def eta_seconds(work: Work, ahead: Ahead | None, rate: float) -> float | None:
    """Seconds until a job's last image is made; `ahead` as the store tells it.

    `rate` is denoising steps a second. None when the rate is unknown; 0 when nothing is left.
    """
    if work.is_over:
        return 0.0
    if rate <= 0:
        return None
    others = max(0, ahead.last - (work.waiting - 1)) if ahead else 0
    return round((work.left + others * work.mean) / rate, 1)
