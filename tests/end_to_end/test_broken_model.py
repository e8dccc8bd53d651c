"""A damaged model folder: everything else works, and the file is named wherever users look."""

import re
import shutil
from pathlib import Path

import pytest

from tests import web
from tests.end_to_end.deployment import ROOT, processes_of, run, up
from tests.waiting import wait_until

SMALL = "max_sequence_length = 77\ndefaults = { width = 128, height = 128, steps = 2 }\n"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A catalog with a model whose transformer is truncated, and with a missing model."""
    shutil.copytree(ROOT / "demo" / "model", tmp_path / "model")
    weights = tmp_path / "model" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    catalog = tmp_path / "models.toml"
    entry = '[models.{}]\npath = "./{}"\ndtype = "float32"\nworkers = 1\n'
    names = [("broken", "model"), ("missing", "nowhere")]
    catalog.write_text("".join(entry.format(*pair) + SMALL for pair in names))
    return catalog


def test_the_file_is_named_and_loaded_again_only_after_it_was_fixed(
    models: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "model" / WEIGHTS
    with up(tmp_path / "data", models) as deployment:

        def reason() -> str:
            response = web.get(f"{deployment.url}/readyz")
            assert response.status_code == 503
            return str(response.json()["detail"])

        def workers(name: str) -> list[dict[str, object]]:
            listed = web.get(f"{deployment.url}/v1/workers").json()["data"]
            return [worker for worker in listed if worker["model"] == name]

        def log() -> str:
            return (tmp_path / "data" / "workers.log").read_text()

        wait_until(lambda: WEIGHTS in reason() and str(tmp_path / "nowhere") in reason())
        assert deployment.answers()
        assert web.get(f"{deployment.url}/v1/models").json()["data"][0]["ready_workers"] == 0
        wait_until(lambda: "imagemill is running, but no worker is ready" in deployment.said())
        wait_until(lambda: log().count("model can't be served") == 2)
        [broken], [missing] = workers("broken"), workers("missing")
        assert (broken["state"], missing["state"]) == ("failed", "failed")
        request = {"model": "broken", "prompts": ["a circle"]}
        job = web.post(f"{deployment.url}/v1/jobs", json=request)
        assert job.status_code == 202
        [warning] = job.json()["warnings"]
        assert warning.startswith("no worker of model 'broken' can start") and WEIGHTS in warning
        body = {"model": "broken", "prompt": "a circle", "size": "128x128"}
        refused = web.post(f"{deployment.url}/v1/images/generations", json=body)
        assert refused.status_code == 503 and WEIGHTS in refused.json()["error"]["message"]
        shutil.copy(ROOT / "demo" / "model" / WEIGHTS, weights)
        path = f"{deployment.url}/v1/jobs/{job.json()['id']}"
        wait_until(lambda: web.get(path).json()["state"] == "succeeded")
        assert web.get(path).json()["warnings"] == []
        wait_until(lambda: [worker["state"] for worker in workers("broken")] == ["ready"])
        assert workers("missing")[0]["id"] == missing["id"]
        assert len(re.findall(r"worker can't start(?! until)", log())) == 2


def test_generate_gives_up_with_the_reason(models: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    models.write_text(models.read_text().partition("[models.missing]")[0])
    done = run("generate", "a", "--out", tmp_path / "out", "--data", data, "--models", models)
    assert done.returncode == 1
    assert "error: couldn't load the model: model 'broken'" in done.stderr
    assert WEIGHTS in done.stderr.replace("\n", "")
    assert processes_of(data) == {}
