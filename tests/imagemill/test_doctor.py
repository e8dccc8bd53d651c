"""What `doctor` finds on good and on broken machines."""

import json
import shutil
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from imagemill import doctor
from imagemill.cli import app
from imagemill.doctor import findings, missing_part
from imagemill.errors import StartFailed
from imagemill.up import choose_port, reachable
from jobs.catalog import Model

DEMO = Path(__file__).parents[2] / "demo" / "model"


@pytest.fixture
def model(tmp_path: Path) -> Model:
    shutil.copytree(DEMO, tmp_path / "model")
    return Model("demo", str(tmp_path / "model"), local=True)


def test_the_bundled_model_is_whole(model: Model) -> None:
    assert missing_part(model) is None
    assert missing_part(Model("hub", "owner/name")) is None


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("model_index.json", "model_index.json is missing"),
        ("vae", "vae is missing or empty"),
        ("vae/diffusion_pytorch_model.safetensors", "vae holds no weights"),
    ],
)
def test_a_missing_part_is_named(model: Model, part: str, said: str) -> None:
    path = Path(model.path) / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert said in (missing_part(model) or "")


def test_a_cut_file_and_a_missing_shard_are_named(model: Model) -> None:
    weights = Path(model.path) / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert f"{weights} has {len(whole) - 1} bytes" in (missing_part(model) or "")
    weights.write_bytes(whole[:100])
    assert "cut short" in (missing_part(model) or "")
    weights.write_bytes(whole)
    index = weights.with_suffix(".safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"a": weights.name, "b": "shard-2.safetensors"}}))
    assert "shard-2.safetensors is missing" in (missing_part(model) or "")


def test_a_broken_machine_fails_with_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without torch, on a data folder that is a file, with a catalog that is not there."""

    def no_package(name: str) -> str:
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", no_package)
    monkeypatch.setenv("IMAGEMILL_REDIS_SERVER", str(tmp_path / "none"))
    monkeypatch.delenv("IMAGEMILL_REDIS_URL", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        data = tmp_path / "data"
        data.touch()
        found = {f.name: f for f in findings(data, tmp_path / "no.toml", "127.0.0.1", port)}
    bad = {name for name, finding in found.items() if finding.verdict == "bad"}
    assert bad == {"torch", "queue", "data folder", "models", "port"}
    assert f"port {port} on 127.0.0.1 is taken" in found["port"].detail


def test_the_command_on_this_machine(tmp_path: Path) -> None:
    arguments = ["doctor", "--data", str(tmp_path), "--port", "0"]
    done = CliRunner().invoke(app, [*arguments, "--json"], env={"IMAGEMILL_REDIS_URL": None})
    verdicts = {finding["name"]: finding["verdict"] for finding in json.loads(done.stdout)}
    assert done.exit_code == 0, done.output
    assert {verdicts[name] for name in ("python", "torch", "queue", "model demo")} == {"ok"}


def test_ports() -> None:
    assert choose_port("127.0.0.1", 0) > 0
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(StartFailed, match="choose another with --port"),
    ):
        choose_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(StartFailed, match=r"cannot listen on no\.such\.host\.invalid"):
        choose_port("no.such.host.invalid", 0)
    assert [reachable(h) for h in ("0.0.0.0", "::", "10.0.0.1")] == [
        "127.0.0.1",
        "[::1]",
        "10.0.0.1",
    ]
