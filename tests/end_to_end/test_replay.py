"""Reproducibility: an image is regenerated bit for bit from its file alone."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.deployment import Deployment, run


@pytest.mark.parametrize("format", ["png", "webp"])
def test_replay_is_bit_equal(deployment: Deployment, tmp_path: Path, format: str) -> None:
    """The first was generated together with two others, the second alone."""
    prompts = ["a large red circle on a white background", "a blue heart", "a green star"]
    flags = ["--n", "1", "--steps", "4", "--format", format, "--out", tmp_path]
    done = run("generate", *prompts, *flags, "--data", deployment.data)
    assert done.returncode == 0, done.stderr
    file = tmp_path / f"0000-a-large-red-circle-on-a-white-background.{format}"
    again = run("replay", file, "--out", tmp_path / "again", "--data", deployment.data)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "bit-equal" in again.stdout
    assert (tmp_path / "again").stat().st_size > 0
    recipes = json.loads(run("inspect", file, tmp_path / "again", "--json").stdout)
    assert [recipe.pop("file") for recipe in recipes] == [str(file), str(tmp_path / "again")]
    assert recipes[0] == recipes[1]
