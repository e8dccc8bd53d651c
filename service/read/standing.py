"""Whether any worker can generate a model's images, according to the workers' reports.

Pure; depends on neither the store nor HTTP.
"""

from collections.abc import Sequence

from jobs.queue.decode import WorkerInfo


def standstill(
    model: str, workers: Sequence[WorkerInfo], absent_seconds: float, patience: float
) -> str | None:
    """Why no worker can run a model's jobs, as a sentence; None if one may.

    Either all of its workers have failed to start, or no worker has been seen for `absent_seconds`,
    which is more than `patience`.
    """
    own = [worker.report for worker in workers if worker.report.model == model]
    if any(not report.failed for report in own):
        return None
    if own:
        reasons = {str(report.error).removeprefix(f"model {model!r}: ") for report in own}
        return f"no worker of model {model!r} can start: {'; '.join(sorted(reasons))}"
    if absent_seconds > patience:
        return f"no worker of model {model!r} is running"
    return None
