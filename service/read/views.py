"""Jobs and images as the JSON of `service/submit/schemas.py`, with their URLs.

Depends on the response schemas and the routes' paths; doesn't read the store.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from jobs.fields import IN_REQUEST
from jobs.job import ImageView, Job, State
from service.submit.schemas import (
    CountsView,
    ImageItem,
    JobSummary,
    JobUrls,
    JobView,
    UndeliveredView,
    WebhookView,
)


@dataclass(frozen=True, slots=True)
class Links:
    """URLs of a deployment: absolute paths, or full URLs if `base` is set.

    `sign` adds a signature to the paths of results, if that's needed to read them without a key.
    """

    base: str = ""
    sign: Callable[[str], str] = str

    def at(self, base: str) -> "Links":
        """The same at another base."""
        return replace(self, base=base)

    def job(self, job_id: str) -> str:
        """The job itself."""
        return f"{self.base}/v1/jobs/{job_id}"

    def image(self, job_id: str, index: int) -> str:
        """The bytes of one image."""
        return self._result(job_id, f"images/{index}")

    def of_job(self, job_id: str) -> JobUrls:
        """All URLs of a job."""
        job = self.job(job_id)
        return JobUrls(
            self=job,
            events=f"{job}/events",
            cancel=f"{job}/cancel",
            retry=f"{job}/retry",
            zip=self._result(job_id, "images.zip"),
            sheet=self._result(job_id, "sheet.png"),
        )

    def _result(self, job_id: str, name: str) -> str:
        return self.base + self.sign(f"/v1/jobs/{job_id}/{name}")


def job_summary(job: Job, links: Links) -> JobSummary:
    """A job without its images."""
    return JobSummary(
        id=job.id,
        model=job.model,
        state=job.state,
        progress=min(max(job.progress, 0.0), 1.0),
        priority=job.priority,
        counts=CountsView(**asdict(job.counts)),
        created=job.created,
        started=job.started,
        finished=job.finished,
        expires=job.expires,
        metadata=job.metadata,
        urls=links.of_job(job.id),
    )


def job_view(
    job: Job,
    images: Sequence[ImageView],
    links: Links,
    *,
    position: int | None,
    eta: float | None,
    warnings: Sequence[str] = (),
) -> JobView:
    """A job with its images."""
    return JobView(
        **dict(job_summary(job, links)),
        queue_position=position,
        eta_seconds=eta,
        warnings=list(warnings),
        webhook=_webhook(job),
        images=[image_item(job.id, image, links) for image in images],
    )


def _webhook(job: Job) -> WebhookView | None:
    if job.webhook is None:
        return None
    undelivered = [UndeliveredView(**asdict(message)) for message in job.undelivered]
    return WebhookView(**job.webhook, undelivered=undelivered)


def image_item(job_id: str, image: ImageView, links: Links) -> ImageItem:
    """One image of a job."""
    request, result = image.request, image.result
    return ImageItem(
        index=image.index,
        state=image.state,
        **{name: getattr(request, name) for name in IN_REQUEST},
        # Some schedulers run more forward passes than the requested number of steps.
        step=request.steps if image.state is State.SUCCEEDED else min(image.step, request.steps),
        attempts=image.attempts,
        error=image.error,
        url=links.image(job_id, image.index) if result else None,
        sha256=result.sha256 if result else None,
        size=result.size if result else None,
        media_type=result.media_type if result else None,
        seconds=result.seconds if result else None,
        warnings=list(result.warnings) if result else [],
    )
