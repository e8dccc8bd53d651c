"""When a job will be done, from what live workers measured. Pure arithmetic.

The workers of a model are taken as so many slots, as many as samples share their forward passes,
of the same speed each. What goes before the job's last image is dealt to them evenly, then the
job's own images one by one: so the last images, which leave slots empty, cost their whole time.
A slot that is free takes the shortest of what the workers hold, as they do; they hold as much
again as runs.
Work is counted in pixel-steps, since the time of a step grows with the picture.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace

from jobs.job import ImageView, Job, State
from jobs.queue.decode import Ahead, WorkerInfo


@dataclass(frozen=True, slots=True)
class Speed:
    """What the ready workers of a model do together.

    `rate` is pixel-steps a second, 0 if unknown; `slots` samples of a forward pass; `held`
    pixel-steps still to do of the images that they hold, whosever they are.
    """

    rate: float = 0.0
    slots: float = 1.0
    held: float = 0.0


@dataclass(frozen=True, slots=True)
class Work:
    """What is left of a job: pixel-steps of each unfinished image, in order, the running first.

    `running` is the share of it that workers hold.
    """

    images: Sequence[float]
    running: float = 0.0


def speed(workers: Iterable[WorkerInfo], model: str) -> Speed:
    """The speed of the ready workers of a model that have measured theirs."""
    ready = [
        worker.info
        for worker in workers
        if worker.info.get("model") == model and worker.info.get("state") == "ready"
    ]
    known = [info for info in ready if _number(info.get("pixel_steps_per_second"))]
    return Speed(
        rate=sum(_number(info["pixel_steps_per_second"]) for info in known),
        slots=sum(max(1.0, _number(info.get("samples_per_forward"))) for info in known),
        held=sum(_number(info.get("held_pixel_steps")) for info in ready),
    )


def work_of_images(images: Sequence[ImageView]) -> Work:
    """What is left of a job with these images, exactly."""
    unfinished = [image for image in images if not image.state.finished]
    left = {
        image.index: float(max(0, image.request.steps - image.step) * image.request.pixels)
        for image in unfinished
    }
    running = [image.index for image in unfinished if image.state is State.RUNNING]
    order = dict.fromkeys([*running, *left])
    return Work([left[index] for index in order], sum(left[index] for index in running))


def work_of_counts(job: Job) -> Work:
    """What is left of a job, its images taken to be alike."""
    counts = job.counts
    if not job.steps or job.state.finished:
        return Work(())
    mean = job.cost
    left = (1 - job.progress) * mean * counts.total
    begun = max(0.0, left - counts.queued * mean)
    each = [begun / counts.running] * counts.running if counts.running else []
    return Work([*each, *[mean] * counts.queued], begun)


def eta_seconds(work: Work, ahead: Ahead | None, speed: Speed) -> float | None:
    """Seconds until a job's last image is made; `ahead` as the store tells it.

    None when the rate is unknown; 0 when nothing is left.
    """
    if not work.images:
        return 0.0
    if speed.rate <= 0:
        return None
    others = max(0.0, speed.held - work.running) + (ahead.work if ahead else 0.0)
    slots = max(1, round(speed.slots))
    return round(_last_end(work.images, others, slots) * slots / speed.rate, 1)


def _last_end(images: Sequence[float], others: float, slots: int) -> float:
    """When the last image ends, in pixel-steps of one slot."""
    busy_until = [others / slots] * slots
    heapify(busy_until)
    waiting: list[float] = []
    last = 0.0
    for count, image in enumerate(images, 1):
        heappush(waiting, image)
        while len(waiting) > (slots if count < len(images) else 0):
            done = busy_until[0] + heappop(waiting)
            heapreplace(busy_until, done)
            last = max(last, done)
    return last


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and value > 0 else 0.0
