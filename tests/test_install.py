"""An installed imagemill: every file that it needs is in the wheel, and no catalog is required."""

import subprocess
import tomllib
import warnings
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import apply_configuration
from setuptools.dist import Distribution

from jobs.catalog import BUILT_IN, load_catalog
from jobs.errors import ConfigurationError
from jobs.runtime.settings import QueueSettings
from tests.imagemill.test_generate import run

ROOT = Path(__file__).resolve().parents[1]
NOT_NEEDED = {"demo/.gitignore", "demo/README.md", "demo/samples.png"}
PACKAGES = ("imagemill", "service", "workers", "pipelines", "jobs", "demo")


def tracked() -> set[str]:
    """The packages' files as git lists them, so that nothing ignored or generated counts."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name for name in done.stdout.split("\n") if name and (ROOT / name).exists()}


def in_the_wheel() -> set[str]:
    """The files that setuptools would put into the wheel."""
    distribution = Distribution({"script_name": "setup.py"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # parts of setuptools' own configuration are in beta
        apply_configuration(distribution, "pyproject.toml")
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    modules = {str(Path(path)) for _, _, path in build.find_all_modules()}
    data = {f"{source}/{name}" for _, source, _, names in build.data_files for name in names}
    return modules | {str(Path(path)) for path in data}


def test_the_wheel_has_every_file_of_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    there = in_the_wheel()
    assert tracked() - NOT_NEEDED == {name for name in there if "__pycache__" not in name}
    assert "demo/model/transformer/diffusion_pytorch_model.safetensors" in there
    assert {"jobs/models.toml", "jobs/queue/lua/claim.lua", "service/web/index.html"} <= there


def test_the_built_in_catalog_is_the_checkouts() -> None:
    assert dict(load_catalog(BUILT_IN).models) == dict(load_catalog(ROOT / "models.toml").models)


def test_every_example_in_the_built_in_catalog_is_valid(tmp_path: Path) -> None:
    """Each block that's commented out is a catalog of its own."""
    (tmp_path / "flux1-dev-Q8_0.gguf").touch()
    (tmp_path / "ae.safetensors").touch()
    names = []
    for number, block in enumerate(BUILT_IN.read_text().split("\n\n")):
        lines = [line.removeprefix("#").removeprefix(" ") for line in block.splitlines()]
        starts = [place for place, line in enumerate(lines) if line.startswith("[models.")]
        for start in starts if block.startswith("#") else ():
            path = tmp_path / f"{number}.toml"
            path.write_text("\n".join(lines[start:]))
            names += [model.name for model in load_catalog(path)]
    assert names == ["demo", "flux", "flux", "flux-gguf", "sdxl"]


def test_without_a_catalog_the_built_in_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGEMILL_MODELS", raising=False)
    assert QueueSettings.read().models == BUILT_IN
    assert QueueSettings.read(models=Path("other.toml")).models == Path("other.toml")
    (tmp_path / "models.toml").touch()
    assert QueueSettings.read().models == Path("models.toml")


def test_a_catalog_that_was_named_must_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("up", "--models", "none.toml", "--port", "0")
    assert done.exit_code == 2
    assert "no catalog at none.toml" in done.stderr and "imagemill init" in done.stderr
    monkeypatch.setenv("IMAGEMILL_MODELS", "none.toml")
    with pytest.raises(ConfigurationError, match=r"none\.toml"):
        load_catalog(QueueSettings.read().models)


def test_init_writes_a_commented_catalog_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("init")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "wrote models.toml" in done.stdout
    written = (tmp_path / "models.toml").read_text()
    assert list(tomllib.loads(written)["models"]) == ["demo"] and "[models.flux]" in written
    [model] = load_catalog(tmp_path / "models.toml")
    assert (Path(model.path) / "model_index.json").exists()
    (tmp_path / "models.toml").write_text("mine")
    done = run("init")
    assert done.exit_code == 2
    assert "models.toml exists already" in done.stderr
    assert (tmp_path / "models.toml").read_text() == "mine"
