"""Settings of workers and their supervisor, read once in `__main__`."""

from pydantic import Field

from jobs.runtime.settings import MOST_SECONDS, QueueSettings


class WorkerSettings(QueueSettings):
    """`IMAGEMILL_*` variables for workers; times in seconds.

    `threads` is the number of torch's CPU threads per worker. `drain_seconds` is how long running
    images may take to finish after SIGTERM before they're given back. `stuck_seconds` is how long
    one forward pass may take before the worker exits. `linger_seconds` is how long an idle worker
    waits for a fuller batch.
    """

    threads: int = Field(default=1, ge=1)
    drain_seconds: float = Field(default=30, ge=0, le=MOST_SECONDS)
    stuck_seconds: float = Field(default=900, gt=0, le=MOST_SECONDS)
    linger_seconds: float = Field(default=0, ge=0, le=MOST_SECONDS)
