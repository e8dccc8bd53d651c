"""Workers of several processes: killed, refused, and started by torchrun or accelerate."""

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagemill.client.clients import Client
from jobs.job import State
from jobs.queue.store import Store, WorkerInfo
from tests.end_to_end.deployment import Deployment, midway, up
from tests.end_to_end.launched import catalog, line, ranks
from tests.pipelines.tiny import save_tiny
from tests.waiting import PATIENCE, wait_until

COUNT = 40

TORCHRUN = ("torch.distributed.run", "--standalone")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("Flux", tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def deployment(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """`imagemill up` with one worker: a group of two ranks."""
    folder = tmp_path_factory.mktemp("group")
    with up(folder / "data", catalog(folder, weights, "ulysses")) as deployment:
        wait_until(deployment.ready_workers)
        yield deployment


@pytest.mark.parametrize("rank", [1, 0])
def test_all_images_arrive_once_after_a_rank_is_killed(
    deployment: Deployment, rank: int, tmp_path: Path
) -> None:
    before = wait_until(lambda: ranks(deployment.data) if deployment.ready_workers() else None)
    assert before.keys() == {0, 1}
    with Client(deployment.url, patience=PATIENCE) as client:
        job = midway(client, "ulysses", "a blue star", n=COUNT, reproducible=False)
        os.kill(before[rank], signal.SIGKILL)
        wait_until(lambda: not set(before.values()) & set(ranks(deployment.data).values()))
        deployment.expire_leases()
        job.wait(PATIENCE)
        assert job.counts.succeeded == COUNT, [image.error for image in job.images()]
        paths = job.save(tmp_path)
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in paths}) == COUNT


def test_an_idle_group_that_loses_a_rank_restarts(deployment: Deployment) -> None:
    wait_until(deployment.ready_workers)
    before = ranks(deployment.data)
    os.kill(before[1], signal.SIGKILL)
    wait_until(lambda: not set(before.values()) & set(ranks(deployment.data).values()))
    with Client(deployment.url, patience=PATIENCE) as client:
        job = client.submit("ulysses", "a blue star").wait(PATIENCE)
        assert job.counts.succeeded == 1
    assert not set(before.values()) & set(ranks(deployment.data).values())


def test_a_group_reports_its_ranks(deployment: Deployment) -> None:
    [worker] = wait_until(deployment.ready_workers)
    assert worker["placement"] == "context_parallel"
    assert worker["ranks"] == 2
    pids = {member["rank"]: member["pid"] for member in worker["group"]}
    assert pids == ranks(deployment.data)


def test_a_group_that_cannot_start_reports_the_error_and_exits(
    weights: Path, tmp_path: Path
) -> None:
    with line(tmp_path, catalog(tmp_path, weights, "short")) as queue:
        queue.start("workers")
        [report] = wait_until(lambda: [w.report for w in failed(queue.store)][:1])
        assert "max_sequence_length 1 is less than the 2 ranks" in (report.error or "")
        assert "short" in (report.error or "")
        wait_until(lambda: "code=2" in queue.said())
        assert (report.error or "").removeprefix("rank 1: ") in queue.said()
        assert queue.end(signal.SIGTERM) == 0


def test_torchrun_starts_a_group_that_ends_with_it(weights: Path, tmp_path: Path) -> None:
    with line(tmp_path, catalog(tmp_path, weights, "ulysses")) as queue:
        queue.start(*TORCHRUN, "--nproc-per-node", "2", "-m", "workers", "--model", "ulysses")
        job = queue.finish(queue.submit("ulysses", 4))
        assert job.state is State.SUCCEEDED
        [worker] = queue.store.workers()
        assert worker.report.ranks == 2
        queue.end(signal.SIGTERM)


def test_a_launcher_with_a_wrong_size_is_refused(weights: Path, tmp_path: Path) -> None:
    with line(tmp_path, catalog(tmp_path, weights, "ulysses")) as queue:
        queue.start(*TORCHRUN, "--nproc-per-node", "1", "-m", "workers", "--model", "ulysses")
        assert queue.process is not None
        assert queue.process.wait(PATIENCE) != 0
        assert "takes 2 processes, but the launcher started 1" in queue.said()
        assert "exitcode  : 2" in queue.said()


def test_accelerate_starts_workers_that_share_the_queue(weights: Path, tmp_path: Path) -> None:
    with line(tmp_path, catalog(tmp_path, weights, "plain")) as queue:
        queue.start(*ACCELERATE, "--num_processes", "2", "-m", "workers", "--model", "plain")
        wait_until(lambda: len(ready(queue.store)) == 2)
        job = queue.finish(queue.submit("plain", 100))
        assert job.state is State.SUCCEEDED
        wait_until(lambda: all(w.report.images_done for w in queue.store.workers()))
        queue.end(signal.SIGINT, whole_group=True)


def test_a_pipelined_group_that_loses_a_stage_restarts(weights: Path, tmp_path: Path) -> None:
    with line(tmp_path, catalog(tmp_path, weights, "pipelined")) as queue:
        queue.start("workers")
        job_id = queue.submit("pipelined", COUNT)
        wait_until(lambda: queue.store.job(job_id, None).counts.succeeded >= 3)
        before = set(ranks(queue.data).values())
        os.kill(ranks(queue.data)[1], signal.SIGKILL)
        wait_until(lambda: not before & set(ranks(queue.data).values()))
        queue.expire_leases()
        job = queue.finish(job_id)
        assert job.counts.succeeded == COUNT
        assert queue.end(signal.SIGTERM) == 0


def test_a_split_model_is_served(weights: Path, tmp_path: Path) -> None:
    with line(tmp_path, catalog(tmp_path, weights, "phased")) as queue:
        queue.start("workers")
        job = queue.finish(queue.submit("phased", 10))
        assert job.counts.succeeded == 10
        [worker] = queue.store.workers()
        assert worker.report.placement == "split"
        assert queue.end(signal.SIGTERM) == 0


def ready(store: Store) -> list[WorkerInfo]:
    """The workers that are ready."""
    return [worker for worker in store.workers() if worker.report.ready]


def failed(store: Store) -> list[WorkerInfo]:
    """The workers that couldn't start."""
    return [worker for worker in store.workers() if worker.report.failed]
