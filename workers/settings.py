"""Settings of a worker and its supervisor: the queue's, and these. Read once, in `__main__`."""

from jobs.settings import QueueSettings


class WorkerSettings(QueueSettings):
    """`IMAGEMILL_*` variables of the worker side; times in seconds.

    `threads` are torch's CPU threads for each worker. `drain_seconds` is how long SIGTERM lets
    running images finish before their leases are given back. `stuck_seconds` is how long one
    forward pass may take before the worker gives itself up. `linger_seconds` is how long a worker
    with nothing to do waits for a fuller batch.
    """

    threads: int = 1
    drain_seconds: float = 30
    stuck_seconds: float = 900
    linger_seconds: float = 0
