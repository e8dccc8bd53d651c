"""Decides how many images a worker gives back to the queue so that idle workers can run them.

A worker holds more than one forward batch, so it never waits for the queue. At the end of a backlog
the queue is empty, and other workers of the model would be idle while this one holds images that
haven't started. So it gives an even share of those back. Started images stay, a worker with any
image in flight isn't idle, and a worker that gave some back claims nothing for a moment. So images
only move towards idle workers, and at most once per heartbeat from each worker.
"""

from jobs.queue.store import WorkerInfo

REST_SECONDS = 1.0
"""How long a worker that gave images back leaves the queue to the others."""


def idle_workers(workers: list[WorkerInfo], name: str, model: str) -> int:
    """Number of other workers of the model that last registered as idle."""
    return sum(
        worker.report.model == model and worker.report.ready and worker.report.in_flight == 0
        for worker in workers
        if worker.id != name
    )


def surplus(held: int, unstarted: int, idle: int) -> int:
    """How many unstarted images to give back, so that all workers hold about the same number."""
    return min(unstarted, held * idle // (idle + 1))
