"""A model folder that is damaged: all else works, and everybody can read which file it is."""

import shutil
from pathlib import Path

import pytest

from tests import web
from tests.end_to_end import mill as mills
from tests.end_to_end.mill import ROOT, processes_of
from tests.waiting import wait_until

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A catalog of a model whose transformer is cut short and of one that is not there."""
    shutil.copytree(ROOT / "demo" / "model", tmp_path / "model")
    weights = tmp_path / "model" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    catalog = tmp_path / "models.toml"
    entry = '[models.{}]\npath = "./{}"\ndtype = "float32"\nworkers = 1\n'
    catalog.write_text(entry.format("broken", "model") + entry.format("missing", "nowhere"))
    return catalog


def test_readyz_names_the_file_and_the_api_is_up(models: Path, tmp_path: Path) -> None:
    with mills.up(tmp_path / "data", models) as mill:

        def reason() -> str:
            response = web.get(f"{mill.url}/readyz")
            assert response.status_code == 503
            return str(response.json()["detail"])

        wait_until(lambda: WEIGHTS in reason() and str(tmp_path / "nowhere") in reason())
        assert mill.answers()
        assert web.get(f"{mill.url}/v1/models").json()["data"][0]["ready_workers"] == 0
        wait_until(lambda: "imagemill is up, but no worker is ready" in mill.said())


def test_generate_gives_up_with_the_reason(models: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    models.write_text(models.read_text().partition("[models.missing]")[0])
    done = mills.run("generate", "a", "--out", tmp_path / "out", "--data", data, "--models", models)
    assert done.returncode == 1
    assert "error: the model cannot be loaded: model 'broken'" in done.stderr
    assert WEIGHTS in done.stderr.replace("\n", "")
    assert processes_of(data) == {}
