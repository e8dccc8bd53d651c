"""A model folder that is damaged: everything else works, and everybody can read which file it is."""

import shutil
from pathlib import Path

import httpx
import pytest

from tests.end_to_end import mill as mills
from tests.end_to_end.mill import ROOT, processes_of
from tests.waiting import wait_until

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A catalog whose one model has a transformer cut short."""
    shutil.copytree(ROOT / "demo" / "model", tmp_path / "model")
    weights = tmp_path / "model" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    catalog = tmp_path / "models.toml"
    catalog.write_text('[models.broken]\npath = "./model"\ndtype = "float32"\nworkers = 1\n')
    return catalog


def test_readyz_names_the_file_and_the_api_is_up(models: Path, tmp_path: Path) -> None:
    with mills.up(tmp_path / "data", models) as mill:

        def reason() -> str:
            response = httpx.get(f"{mill.url}/readyz")
            assert response.status_code == 503
            return str(response.json()["detail"])

        wait_until(lambda: "failed" in reason(), 60)
        assert WEIGHTS in reason()
        assert mill.answers()
        assert httpx.get(f"{mill.url}/v1/models").json()["data"][0]["ready_workers"] == 0


def test_generate_gives_up_with_the_reason(models: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    done = mills.run("generate", "a", "--out", tmp_path / "out", "--data", data, "--models", models)
    assert done.returncode == 1
    assert "broken cannot be loaded" in done.stderr
    assert WEIGHTS in done.stderr.replace("\n", "")
    assert processes_of(data) == {}
