"""A seed's promise: a picture is made again from nothing but its file, bit for bit."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.mill import Mill, run


@pytest.mark.parametrize("format", ["png", "webp"])
def test_a_picture_is_made_again_bit_for_bit(mill: Mill, tmp_path: Path, format: str) -> None:
    """The first was made beside two others, the second alone."""
    prompts = ["a large red circle on a white background", "a blue heart", "a green star"]
    flags = ["--n", "1", "--steps", "4", "--format", format, "--out", tmp_path]
    made = run("generate", *prompts, *flags, "--data", mill.data)
    assert made.returncode == 0, made.stderr
    file = tmp_path / f"0000-a-large-red-circle-on-a-white-background.{format}"
    again = run("replay", file, "--out", tmp_path / "again", "--data", mill.data)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "bit-equal" in again.stdout
    assert (tmp_path / "again").stat().st_size > 0
    shown = json.loads(run("inspect", file, tmp_path / "again", "--json").stdout)
    assert [one.pop("file") for one in shown] == [str(file), str(tmp_path / "again")]
    assert shown[0] == shown[1]
