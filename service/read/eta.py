"""Estimates when a job will be finished, from the speed that live workers measured. Pure.

A model's workers are treated as a number of equally fast slots, one per sample in their forward
passes. Other work ahead of the job is spread over the slots evenly, then the job's own images are
assigned one by one. So the last images take their full time, although they leave other slots idle.
As in the real workers, a free slot takes the shortest image of a look-ahead as large as the number
of slots. Work is measured in pixel-steps, because the time of a step grows with the image's size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace

from jobs.job import ImageView, Job, State
from jobs.queue.decode import Ahead, WorkerInfo


@dataclass(frozen=True, slots=True)
class Speed:
    """The total speed of a model's ready workers.

    `rate` is in pixel-steps per second, 0 if unknown; `slots` is the number of samples in their
    forward passes; `held` is the remaining pixel-steps of all images that they hold, of any job.
    """

    rate: float = 0.0
    slots: float = 1.0
    held: float = 0.0


@dataclass(frozen=True, slots=True)
class Work:
    """A job's remaining work: pixel-steps of each unfinished image, in order, running ones first.

    `running` is the part of it that workers hold.
    """

    images: Sequence[float]
    running: float = 0.0


def speed(workers: Iterable[WorkerInfo], model: str) -> Speed:
    """The total speed of a model's ready workers, as far as they've measured it."""
    reports = [worker.report for worker in workers]
    ready = [report for report in reports if report.model == model and report.ready]
    measured = [report for report in ready if report.pixel_steps_per_second]
    return Speed(
        rate=sum(report.pixel_steps_per_second or 0.0 for report in measured),
        slots=sum(max(1.0, report.samples_per_forward or 0.0) for report in measured),
        held=sum(report.held_pixel_steps or 0.0 for report in ready),
    )


def work_of_images(images: Sequence[ImageView]) -> Work:
    """The exact remaining work of a job with these images."""
    unfinished = [image for image in images if not image.state.finished]
    left = {
        image.index: float(max(0, image.request.steps - image.step) * image.request.pixels)
        for image in unfinished
    }
    running = [image.index for image in unfinished if image.state is State.RUNNING]
    order = dict.fromkeys([*running, *left])
    return Work([left[index] for index in order], sum(left[index] for index in running))


def work_of_counts(job: Job) -> Work:
    """The remaining work of a job, assuming that all its images cost the same."""
    counts = job.counts
    if not job.steps or job.state.finished:
        return Work(())
    mean = job.cost
    left = (1 - job.progress) * mean * counts.total
    # Queued images have all their work left, so the rest belongs to the running ones.
    begun = max(0.0, left - counts.queued * mean)
    running = [begun / counts.running] * counts.running if counts.running else []
    return Work([*running, *[mean] * counts.queued], begun)


def eta_seconds(work: Work, ahead: Ahead | None, speed: Speed) -> float | None:
    """Seconds until a job's last image is finished; `ahead` is the work ahead of it in the queue.

    None if the rate is unknown; 0 if nothing is left.
    """
    if not work.images:
        return 0.0
    if speed.rate <= 0:
        return None
    # `held` includes this job's running images, which are already in `work`.
    others = max(0.0, speed.held - work.running) + (ahead.work if ahead else 0.0)
    slots = max(1, round(speed.slots))
    # `rate` is that of all slots together, and `_last_end` is in work of one slot.
    return round(_last_end(work.images, others, slots) * slots / speed.rate, 1)


def _last_end(images: Sequence[float], others: float, slots: int) -> float:
    """When the last image ends, in pixel-steps of one slot."""
    # We don't know which slot gets which of the other images, so they're spread evenly.
    busy_until = [others / slots] * slots
    heapify(busy_until)
    waiting: list[float] = []
    last = 0.0
    for count, image in enumerate(images, 1):
        heappush(waiting, image)
        # Workers claim as many images ahead as they run and start the shortest first, so the order
        # in which images end differs from the order of the queue. Assign an image only once that
        # look-ahead is full; after the last image, assign all the rest.
        while len(waiting) > (slots if count < len(images) else 0):
            done = busy_until[0] + heappop(waiting)
            heapreplace(busy_until, done)
            last = max(last, done)
    return last
