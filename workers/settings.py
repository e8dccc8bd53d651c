"""Settings of a worker and its supervisor: the queue's, and these. Read once, in `__main__`."""

from pydantic import Field

from jobs.runtime.settings import MOST_SECONDS, QueueSettings


class WorkerSettings(QueueSettings):
    """`IMAGEMILL_*` variables of the worker side; times in seconds.

    `threads` are torch's CPU threads for each worker. `drain_seconds` is how long SIGTERM lets
    running images finish before their leases are given back. `stuck_seconds` is how long one
    forward pass may take before the worker gives itself up. `linger_seconds` is how long a worker
    with nothing to do waits for a fuller batch.
    """

    threads: int = Field(default=1, ge=1)
    drain_seconds: float = Field(default=30, ge=0, le=MOST_SECONDS)
    stuck_seconds: float = Field(default=900, gt=0, le=MOST_SECONDS)
    linger_seconds: float = Field(default=0, ge=0, le=MOST_SECONDS)
