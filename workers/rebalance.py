"""At the end of a backlog: whether to leave some of what this worker holds to one that is idle.

A worker holds more than one forward batch, so that it never waits for the queue. When the queue is
empty, that would leave others of its model idle beside images that have not begun. It then gives an
even share of those back to the queue. An image that has begun stays, a worker that has any in
flight is not idle, and whoever gave some back claims nothing for a moment; so an image moves only
towards idle workers, and from each at most once a beat.
"""

from jobs.queue.store import WorkerInfo

REST_SECONDS = 1.0
"""How long a worker that gave images back leaves the queue to the others."""


def idle_neighbours(workers: list[WorkerInfo], name: str, model: str) -> int:
    """How many other workers of the model have nothing to do, by what they last registered."""
    return sum(
        worker.info.get("model") == model
        and worker.info.get("state") == "ready"
        and worker.info.get("in_flight") == 0
        for worker in workers
        if worker.id != name
    )


def surplus(held: int, unstarted: int, idle: int) -> int:
    """How many of the unstarted images to give back, so that all hold about as many."""
    return min(unstarted, held * idle // (idle + 1))
