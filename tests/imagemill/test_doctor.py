"""`imagemill doctor` on good and on broken machines."""

import json
import shutil
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from imagemill.cli import app
from imagemill.client.errors import StartFailed
from imagemill.commands import doctor
from imagemill.commands.doctor import Finding, findings
from imagemill.local.up import choose_port, reachable
from jobs.errors import ConfigurationError
from jobs.queue.store import Store
from jobs.runtime.embedded_queue import EmbeddedServer

DEMO = Path(__file__).parents[2] / "demo" / "model"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


INCOMPLETE = {
    "model_index.json": "model_index.json is missing",
    "vae": "vae is missing (model_index.json lists it as AutoencoderKL)",
    "vae/diffusion_pytorch_model.safetensors": "vae has no weights",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the bundled model: complete, without one part each, and truncated."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("here", "truncated", *(f"without{n}" for n in range(len(INCOMPLETE)))):
        shutil.copytree(DEMO, folder / name)
    for n, part in enumerate(INCOMPLETE):
        path = folder / f"without{n}" / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    weights = folder / "truncated" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    return folder


@pytest.fixture(scope="module")
def verdicts(folder: Path) -> dict[str, tuple[str, str]]:
    """What doctor finds about all of them, the device `cuda:99` and a hub id, checked at once."""
    lines = [f'[models.{path.name}]\npath = "./{path.name}"\n' for path in folder.iterdir()]
    lines.append('[models.elsewhere]\npath = "./here"\ndevices = ["cuda:99"]\n')
    lines.append('[models.hub]\npath = "owner/name"\n')
    (folder / "models.toml").write_text("".join(lines))
    return of_models(folder)


def of_models(folder: Path) -> dict[str, tuple[str, str]]:
    return {f.name: (f.verdict, f.detail) for f in doctor._models(folder / "models.toml")}


def test_the_bundled_model_is_complete(folder: Path, verdicts: dict[str, tuple[str, str]]) -> None:
    assert verdicts["model here"] == ("ok", str(folder / "here"))
    assert verdicts["model hub"] == ("ok", "owner/name from the Hugging Face hub")


@pytest.mark.parametrize("part", INCOMPLETE)
def test_a_missing_part_is_named(verdicts: dict[str, tuple[str, str]], part: str) -> None:
    verdict, detail = verdicts[f"model without{list(INCOMPLETE).index(part)}"]
    assert verdict == "bad" and INCOMPLETE[part] in detail


def test_a_truncated_file_is_named(folder: Path, verdicts: dict[str, tuple[str, str]]) -> None:
    weights = folder / "truncated" / WEIGHTS
    assert f"{weights} is truncated or corrupt" in verdicts["model truncated"][1]


def test_an_unusable_device_is_named(verdicts: dict[str, tuple[str, str]]) -> None:
    verdict, detail = verdicts["model elsewhere"]
    assert verdict == "bad" and "cuda:99" in detail


NO_DEVICE = {"version": "2.11.0+cpu", "kind": "cpu", "count": 0, "names": []}


def test_the_reason_for_no_accelerator_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "accelerators", lambda: ["cpu"])
    monkeypatch.setattr(doctor, "why_none", lambda: "CUDA_VISIBLE_DEVICES='-1' hides every GPU")
    finding = doctor._devices(NO_DEVICE)
    assert finding.verdict == "warning"
    assert finding.detail.startswith("no accelerator (CUDA_VISIBLE_DEVICES='-1' hides every GPU); ")


def test_gpus_that_torch_does_not_see_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "accelerators", lambda: ["cuda:0", "cuda:1"])
    monkeypatch.setattr(doctor, "why_none", lambda: "")
    finding = doctor._devices(NO_DEVICE)
    assert finding.verdict == "bad"
    assert finding.detail == "the driver lists cuda:0, cuda:1, but torch 2.11.0+cpu finds none"
    seen = NO_DEVICE | {"kind": "cuda", "count": 2, "names": ["H100", "H100"]}
    assert doctor._devices(seen) == Finding("devices", "ok", "2 cuda: H100, H100")


def test_an_invalid_cuda_visible_devices_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[str]:
        raise ConfigurationError("CUDA_VISIBLE_DEVICES='0,0' names 0 twice")

    monkeypatch.setattr(doctor, "accelerators", fail)
    finding = doctor._devices(NO_DEVICE)
    assert (finding.verdict, finding.detail) == ("bad", "CUDA_VISIBLE_DEVICES='0,0' names 0 twice")
    assert doctor._counted() == []


def test_models_that_cannot_be_checked_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models.toml").write_text('[models.hub]\npath = "owner/name"\n')
    monkeypatch.setattr(doctor, "_CHECK_MODELS", "import no_torch")
    [(verdict, detail)] = of_models(tmp_path).values()
    assert verdict == "warning" and "No module named 'no_torch'" in detail


@pytest.mark.parametrize(
    ("name", "found"),
    [("POOL", {"settings", "queue"}), ("THREADS", {"settings"}), ("PORT", {"settings"})],
)
def test_invalid_settings_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, found: set[str]
) -> None:
    monkeypatch.delenv("IMAGEMILL_REDIS_URL", raising=False)
    monkeypatch.setenv(f"IMAGEMILL_{name}", "-1 {}")
    checks = [doctor._settings(tmp_path, tmp_path / "models.toml"), doctor._queue(tmp_path)]
    bad = {check.name for check in checks if check.verdict == "bad"}
    assert bad == found
    assert all(f"IMAGEMILL_{name}" in c.detail for c in checks if c.name in bad)


def test_the_connection_to_the_queue_server_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, close = [], Store.close

    def watched(store: Store) -> None:
        closed.append(store)
        close(store)

    monkeypatch.setattr(Store, "close", watched)
    with EmbeddedServer.ensure(tmp_path / "queue") as server:
        monkeypatch.setenv("IMAGEMILL_REDIS_URL", server.url)
        assert doctor._queue(tmp_path).verdict == "ok"
    assert len(closed) == 1


def test_a_broken_machine_fails_with_details(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without torch, with a file as the data folder, and without a catalog."""

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
    assert f"port {port} on 127.0.0.1 is already in use" in found["port"].detail


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
    with pytest.raises(StartFailed, match=r"can't listen on no\.such\.host\.invalid"):
        choose_port("no.such.host.invalid", 0)
    assert [reachable(h) for h in ("0.0.0.0", "::", "10.0.0.1")] == [
        "127.0.0.1",
        "[::1]",
        "10.0.0.1",
    ]
