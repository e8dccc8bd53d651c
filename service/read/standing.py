"""Whether a model's images will be made: by what its workers say of themselves.

Pure; knows neither the store nor HTTP.
"""

from collections.abc import Sequence

from jobs.queue.decode import WorkerInfo


def standstill(
    model: str, workers: Sequence[WorkerInfo], absent_seconds: float, patience: float
) -> str | None:
    """Why nothing is being made of a model's jobs, as a sentence; None while a worker may.

    All of its workers have failed to start, or none has been seen for more than `patience` of the
    `absent_seconds` since one was.
    """
    own = [worker.info for worker in workers if worker.info.get("model") == model]
    if any(info.get("state") != "failed" for info in own):
        return None
    if own:
        reasons = {str(info.get("error")).removeprefix(f"model {model!r}: ") for info in own}
        return f"no worker of model {model!r} can start: {'; '.join(sorted(reasons))}"
    if absent_seconds > patience:
        return f"no worker of model {model!r} is running"
    return None
