"""`python -m service` as a process: its port, its shutdown, its errors."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import web
from tests.waiting import PATIENCE, wait_until

ROOT = Path(__file__).parents[2]
CATALOG = """
[models.demo]
path = "./model"
defaults = { width = 64, height = 64, steps = 4, guidance_scale = 1.0 }
"""


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A service process on a free port, and its address."""
    (folder / "models.toml").write_text(CATALOG)
    env = os.environ | {
        "IMAGEMILL_DATA": str(folder / "data"),
        "IMAGEMILL_MODELS": str(folder / "models.toml"),
    }
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "--port", "0", *flags],
            env=env,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        match = wait_until(lambda: re.search(r"http://[\d.]+:(\d+)", log.read_text()))
        yield process, f"http://127.0.0.1:{match[1]}"
    finally:
        process.kill()
        process.wait()


def test_serves_on_loopback_and_stops_gracefully_during_a_wait(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, address):
        body = {"model": "demo", "prompts": ["a"]}
        job = web.post(f"{address}/v1/jobs", json=body).json()
        with ThreadPoolExecutor(1) as pool:
            url = f"{address}/v1/jobs/{job['id']}?wait=60"
            waiting = pool.submit(web.get, url)
            wait_until(lambda: "imagemill_waits 1.0" in web.get(f"{address}/metrics").text)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
            assert waiting.result().json()["id"] == job["id"]


def test_configuration_error_is_one_line(tmp_path: Path) -> None:
    env = os.environ | {"IMAGEMILL_MODELS": str(tmp_path / "none.toml")}
    done = subprocess.run(
        [sys.executable, "-m", "service"], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "none.toml" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("port", ["-1", "70000"])
def test_invalid_port_is_refused(port: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service", "--port", port],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "IMAGEMILL_PORT" in done.stderr
