"""A new user's first steps: prompts to files with recipes, Ctrl-C, and resuming."""

import io
import json
import os
import signal
import subprocess
from pathlib import Path

from PIL import Image

from imagemill.client.clients import Client
from tests.end_to_end.deployment import (
    COMMAND,
    MODELS,
    Deployment,
    environment,
    processes_of,
    run,
    start,
)
from tests.waiting import PATIENCE, wait_until

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "star")
PROMPTS = [
    f"a large {colour} {shape} on a white background" for colour in COLOURS for shape in SHAPES
]


def test_twelve_prompts_become_twelve_images_with_recipes(tmp_path: Path) -> None:
    """Two commands at once on the same folder share the private `up` that one of them starts.

    No process is left when both are done.
    """
    prompts, data = tmp_path / "prompts.txt", tmp_path / "data"
    prompts.write_text("\n".join(PROMPTS))
    where = ["--data", data, "--models", MODELS]
    other = start(
        "generate", "a pink cross", "--out", tmp_path / "b", *where, output=tmp_path / "b.txt"
    )
    done = run("generate", "--file", prompts, "--out", tmp_path / "a", *where)
    assert done.returncode == 0, done.stdout + done.stderr
    assert other.wait(PATIENCE) == 0, (tmp_path / "b.txt").read_text()
    assert len(list((tmp_path / "b").glob("0*.png"))) == 1
    check_pictures(tmp_path / "a")
    wait_until(lambda: processes_of(data) == {})


def check_pictures(out: Path) -> None:
    """Check the twelve files, their contents, and the contact sheet."""
    files = sorted(out.glob("0*.png"))
    assert [path.name[:4] for path in files] == [f"{index:04d}" for index in range(12)]
    for prompt, path in zip(PROMPTS, files, strict=True):
        with Image.open(path) as picture:
            assert picture.size == (128, 128)
            recipe = json.loads(picture.text["imagemill"])
            assert (recipe["prompt"], recipe["model"]) == (prompt, "demo")
            assert picture.text["parameters"].startswith(prompt)
    with Image.open(out / "sheet.png") as sheet:
        sheet.verify()


def test_a_second_up_is_refused_with_the_address_of_the_first(deployment: Deployment) -> None:
    second = run("up", "--port", "0", "--data", deployment.data, "--models", MODELS)
    assert second.returncode == 3
    assert f"already running on {deployment.data} at {deployment.url}" in second.stderr.replace(
        "\n", " "
    )
    assert second.stderr.count("error:") == 1
    assert deployment.answers()


def test_a_port_in_use_is_one_sentence(deployment: Deployment, tmp_path: Path) -> None:
    port = deployment.url.rpartition(":")[2]
    done = run("up", "--port", port, "--data", tmp_path, "--models", MODELS)
    assert done.returncode == 1
    assert f"port {port} on 127.0.0.1 is already in use" in done.stderr
    assert processes_of(tmp_path) == {}


def test_ctrl_c_cancels_and_resume_completes(deployment: Deployment, tmp_path: Path) -> None:
    flags = ["--out", str(tmp_path), "--data", str(deployment.data)]
    log = tmp_path / "log.txt"
    generate = start("generate", *PROMPTS, "--n", "2", "--steps", "6", *flags, output=log)
    wait_until(lambda: len(list(tmp_path.glob("0*.png"))) >= 3)
    os.killpg(generate.pid, signal.SIGINT)
    assert generate.wait(PATIENCE) == 130, log.read_text()
    saved = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("0*.png")}
    assert 3 <= len(saved) < 24
    with Client(deployment.url, patience=PATIENCE) as client:
        job_id = client.get("/v1/jobs", limit=1)["data"][0]["id"]
        assert client.job(job_id).counts.cancelled == 24 - len(saved)
    assert f"imagemill generate --resume {job_id} --out {tmp_path}" in log.read_text()
    resumed = run("generate", "--resume", job_id, *flags, "--json")
    assert resumed.returncode == 0, resumed.stderr
    images = json.loads(resumed.stdout)["images"]
    assert {image["state"] for image in images} == {"succeeded"}
    assert {image["file"] for image in images} == {path.name for path in tmp_path.glob("0*.png")}
    assert len(images) == 24
    now = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("0*.png")}
    assert {name: now[name] for name in saved} == saved


def test_status_models_and_workers(deployment: Deployment) -> None:
    models = json.loads(run("models", "--data", deployment.data, "--json").stdout)
    assert [model["id"] for model in models] == ["demo"]
    assert "ready" in run("workers", "--data", deployment.data).stdout
    assert run("status", "--server", deployment.url).returncode == 0
    refused = run("generate", "a", "--width", "100", "--data", deployment.data)
    assert refused.returncode == 2
    assert "--width" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_private_up_ends_when_its_generate_is_killed(tmp_path: Path) -> None:
    """After SIGKILL in the middle of the start, the private `up` notices that it has no users."""
    data = tmp_path / "data"
    where = ["--data", data, "--models", MODELS]
    generate = start("generate", "a red circle", *where, output=tmp_path / "log.txt")
    wait_until(lambda: (data / "up.json").exists())
    assert len(processes_of(data)) > 1
    generate.kill()
    generate.wait()
    wait_until(lambda: processes_of(data) == {})


def test_ctrl_c_while_starting_leaves_no_process(tmp_path: Path) -> None:
    data = tmp_path / "data"
    where, log = ["--data", data, "--models", MODELS], tmp_path / "log.txt"
    generate = start("generate", "a", "--out", tmp_path, *where, output=log)
    wait_until(lambda: (data / "up.json").exists())
    os.killpg(generate.pid, signal.SIGINT)
    assert generate.wait(PATIENCE) == 130, log.read_text()
    assert "stopped" in log.read_text()
    wait_until(lambda: processes_of(data) == {})


def test_a_closed_pipe_prints_no_traceback(deployment: Deployment) -> None:
    """As in `imagemill status --json | head -1`."""
    command = [*COMMAND, "status", "--data", str(deployment.data), "--json"]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert isinstance(process.stdout, io.BufferedReader)
        process.stdout.close()
        _, errors = process.communicate()
    assert b"Traceback" not in errors
