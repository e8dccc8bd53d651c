"""A service and one worker with a fake model, as processes in their own folder."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests import web
from tests.waiting import PATIENCE, wait_until

ROOT = Path(__file__).parents[2]
MODELS = """
[models.fake]
path = "./model"
dtype = "float32"
workers = 1
defaults = { width = 256, height = 256, steps = 20, guidance_scale = 2.5 }
limits = { max_pixels = 262144, max_steps = 200, max_prompts = 2000 }
"""
ABANDONED = """
[models.abandoned]
path = "./model"
dtype = "float32"
defaults = { width = 256, height = 256, steps = 4, guidance_scale = 1.0 }
"""
"""A model without a worker."""
INDEX = {"_class_name": "FakePipeline", "options": {"seconds_per_step": 0.05}}


@contextmanager
def running_deployment(folder: Path, worker: str = "workers") -> Iterator[str]:
    """Run a service and a ready worker until the context exits; yields the service's address.

    `worker` is the module that runs as the worker.
    """
    (folder / "model").mkdir()
    (folder / "model" / "model_index.json").write_text(json.dumps(INDEX))
    (folder / "models.toml").write_text(MODELS + ABANDONED)
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes.append(_start(folder, "service", "--port", str(port)))
        wait_until(lambda: _answers(processes, f"{url}/healthz"))
        processes.append(_start(folder, worker, "--model", "fake", "--device", "cpu"))
        wait_until(lambda: _answers(processes, f"{url}/readyz"))
        yield url
    finally:
        for process in reversed(processes):
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def submit(url: str, key: str = "", /, **body: Any) -> str:
    """Queue a job of the fake model without the page; returns its id."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    response = web.post(f"{url}/v1/jobs", json={"model": "fake", **body}, headers=headers)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def _start(folder: Path, module: str, *arguments: str) -> subprocess.Popen[bytes]:
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith("IMAGEMILL_")
    }
    ours = {
        "IMAGEMILL_DATA": str(folder / "data"),
        "IMAGEMILL_MODELS": str(folder / "models.toml"),
        "IMAGEMILL_DRAIN_SECONDS": "1",
        "IMAGEMILL_ABSENT_SECONDS": "0",
        "OMP_NUM_THREADS": "1",
    }
    with (folder / f"{module}.txt").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**inherited, **ours},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(processes: list[subprocess.Popen[bytes]], address: str) -> bool:
    assert all(process.poll() is None for process in processes), "a process has ended"
    try:
        return web.get(address, timeout=PATIENCE).status_code == 200
    except httpx.HTTPError:
        return False
