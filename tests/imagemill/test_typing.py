"""A user's program under `mypy --strict`, against the installed package."""

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import assert_type

from imagemill import AsyncClient, Client, Image, Job, Progress
from jobs.job import Counts, State


def report(progress: Progress) -> None:
    assert_type(progress.share, float)


with Client() as client:
    job = client.submit("demo", ["a", {"prompt": "b", "n": 2}], steps=3, metadata={"title": "T"})
    assert_type(job, Job)
    assert_type(job.state, State)
    assert_type(job.counts, Counts)
    assert_type(job.counts.total, int)
    assert_type(job.images()[0].state, State)
    assert_type(job.wait(on_progress=report).save("out"), list[Path])
    assert_type([one.ready_workers for one in client.models()], list[int])
    assert_type([one.images_done for one in client.workers()], list[int | None])
    assert_type(next(client.jobs(state=State.FAILED)).id, str)


async def talk(client: AsyncClient) -> Image:
    job = await client.submit("demo", "a", webhook={"url": "https://h", "events": ["job.failed"]})
    return (await job.wait()).images()[0]
"""

SLIPS = """
from imagemill import Client

client = Client()
client.submit("demo", "a", stepz=3)
client.submit("demo", "a", steps="3")
client.submit("demo", "a", format="gif")
client.submit("demo", "a", webhook={"events": ["job.failed"]})
client.submit("demo", "a").state.finishd
client.submit("demo", "a").wait(on_progress=lambda progress: progress.shares)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mypy")


def judged(folder: Path, cache: Path, program: str) -> list[str]:
    """The output of mypy, which treats our packages as installed ones."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    (folder / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(cache), "program.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return done.stdout.splitlines()


def test_a_typed_program_has_no_errors(tmp_path: Path, cache: Path) -> None:
    assert judged(tmp_path, cache, PROGRAM) == ["Success: no issues found in 1 source file"]


def test_typos_are_type_errors(tmp_path: Path, cache: Path) -> None:
    found = [line for line in judged(tmp_path, cache, SLIPS) if ": error: " in line]
    assert [line.split(":")[1] for line in found] == ["5", "6", "7", "8", "9", "10"]
    assert 'Unexpected keyword argument "stepz"' in found[0]


@pytest.mark.parametrize("package", ["imagemill", "jobs"])
def test_public_packages_have_py_typed(package: str) -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"][package]
    assert (ROOT / package / "py.typed").exists()
