"""Clients generated from the OpenAPI document submit a job, wait for it and download its images."""

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.reports import WorkerReport
from jobs.runtime.embedded_queue import EmbeddedServer
from tests.service.conftest import Deployment, deployed, working
from tests.service.live import listening

SOURCES = Path(__file__).with_name("typescript")
PACKAGE = "generated_imagemill_client"
GENERATOR = ("openapi-python-client==0.29.1", "typer==0.27.3", "ruamel.yaml==0.19.1")


@pytest.fixture(scope="module")
def service(
    server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Deployment, str, Path]]:
    """A service with a worker, its address, and its OpenAPI document as a file."""
    folder = tmp_path_factory.mktemp("generated")
    with ExitStack() as stack:
        deployment = stack.enter_context(deployed(server.url, folder / "data", start=False))
        address = stack.enter_context(listening(deployment.client.app))
        deployment.store.register("w1", WorkerReport("demo", "ready"), 600)
        stack.enter_context(working(deployment))
        document = folder / "openapi.json"
        document.write_text(json.dumps(deployment.client.app.openapi()))
        yield deployment, address, document


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def generator(tmp_path: Path) -> Path:
    """A folder with openapi-python-client, which needs an older typer than imagemill."""
    folder = tmp_path / "generator"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    done = subprocess.run(
        [*pip, "--no-deps", "--target", folder, *GENERATOR],
        env={name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"the package index can't be reached: {done.stderr[-200:]}")
    return folder


def test_python_client(
    service: tuple[Deployment, str, Path],
    generator: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deployment, address, document = service
    config = tmp_path / "config.yaml"
    config.write_text("post_hooks: []\n")
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--fail-on-warning"]
    options = ["--path", document, "--meta", "none", "--config", config]
    target = ["--output-path", tmp_path / PACKAGE]
    said = run(*command, *options, *target, folder=tmp_path, PYTHONPATH=str(generator))
    assert "unsupported" not in said.lower()
    monkeypatch.syspath_prepend(str(tmp_path))
    api = SimpleNamespace(
        **{
            name: importlib.import_module(f"{PACKAGE}.api.{module}.{name}")
            for module, name in (
                ("jobs", "submit_job"),
                ("jobs", "get_job"),
                ("images", "get_image"),
                ("images", "get_archive"),
            )
        }
    )
    models = importlib.import_module(f"{PACKAGE}.models")
    make_client = importlib.import_module(f"{PACKAGE}.client").Client

    body = models.SubmitJob(model="demo", prompts=["a", models.PromptItem(prompt="b", seed=7)])
    assert set(body.to_dict()) == {"model", "prompts"}
    with make_client(base_url=address) as client:
        job = api.submit_job.sync(client=client, body=body)
        while job.finished is None:
            job = api.get_job.sync(job.id, client=client, wait=10)
        assert (job.state, len(job.images)) == (models.State.SUCCEEDED, 2)
        image = api.get_image.sync(job.id, 1, client=client)
        result = deployment.store.image(job.id, 1).result
        assert image.payload.read() == deployment.images.read(result.uri)
        archive = api.get_archive.sync(job.id, client=client)
        names = zipfile.ZipFile(io.BytesIO(archive.payload.read())).namelist()
        assert names == ["manifest.json", "00000.png", "00001.png"]
        missing = api.get_job.sync("none", client=client)
        assert (missing.status, missing.errors) == (404, [])


def test_typescript_client(service: tuple[Deployment, str, Path], tmp_path: Path) -> None:
    _, address, document = service
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    for source in SOURCES.iterdir():
        shutil.copy(source, tmp_path)
    flags = ("--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline")
    installed = subprocess.run([npm, "ci", *flags], cwd=tmp_path, capture_output=True, text=True)
    if installed.returncode != 0 and "network" in installed.stderr.lower():
        pytest.skip(f"the npm registry can't be reached: {installed.stderr[-500:]}")
    assert installed.returncode == 0, installed.stderr
    tools = tmp_path / "node_modules" / ".bin"
    run(tools / "openapi-typescript", document, "-o", "schema.d.ts", folder=tmp_path)
    run(tools / "tsc", "--project", "tsconfig.json", folder=tmp_path)
    printed = run("node", "client.js", folder=tmp_path, SERVICE=address)
    result = json.loads(printed)
    assert (result["state"], result["missing"]) == ("succeeded", 404)
    assert result["image"] == result["sizes"][1] > 0
    assert result["archive"] > sum(result["sizes"])
