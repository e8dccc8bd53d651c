"""Runs the recipes of the README and of docs/client.md against a real service.

Only the address and the path of the virtual environment are replaced.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.docs.pages import ROOT, blocks
from tests.end_to_end.deployment import Deployment
from tests.waiting import PATIENCE, wait_until

README, CLIENT = ROOT / "README.md", ROOT / "docs" / "client.md"


def recipes(page: Path, language: str) -> list[str]:
    """The blocks of a page that need a running service; other tests run `make` and `up`."""
    texts = blocks(page.read_text(), language)
    return [text for text in texts if not re.search(r"^make |imagemill up$", text, re.MULTILINE)]


def follow(deployment: Deployment, folder: Path, language: str, text: str) -> str:
    """Run one block in an empty folder; return what it printed."""
    here = re.sub(r"(localhost|127\.0\.0\.1):8000", deployment.url.removeprefix("http://"), text)
    binaries = str(Path(sys.executable).parent)
    here = here.replace(".venv/bin/", f"{binaries}/")
    program = ["bash", "-euc"] if language == "sh" else [sys.executable, "-c"]
    process = subprocess.run(
        [*program, here],
        cwd=folder,
        env={**os.environ, "IMAGEMILL_DATA": str(deployment.data), "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert process.returncode == 0, f"{text}\n{process.stdout}\n{process.stderr}"
    return process.stdout


@pytest.mark.parametrize(
    ("page", "language", "number", "pictures"),
    [
        (README, "sh", 0, ["out/two/0000-a-large-red-circle-on-a-white-background.png"]),
        (README, "sh", 1, ["out/heart.png"]),
        (
            README,
            "python",
            0,
            ["out/stars/0000-a-green-star.png", "out/stars/0001-a-gray-ring.png"],
        ),
        (README, "python", 1, ["out/square.png"]),
        (README, "python", 2, []),
        (
            CLIENT,
            "python",
            0,
            ["out/client/0001-a-gray-ring.png", "out/client/0002-a-gray-ring.png"],
        ),
        (CLIENT, "python", 1, ["out/crosses/0000-a-red-cross.png"]),
    ],
)
def test_a_recipe_works(
    deployment: Deployment,
    tmp_path: Path,
    page: Path,
    language: str,
    number: int,
    pictures: list[str],
) -> None:
    wait_until(deployment.ready_workers)
    output = follow(deployment, tmp_path, language, recipes(page, language)[number])
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (128, 128)
    if (page, language, number) == (README, "python", 2):
        assert sorted(output.split()) == ["shape-cross", "shape-star", "shape-triangle"]


def test_every_recipe_is_run() -> None:
    """Add a line above for a new recipe; blocks of the catalog are TOML and not run."""
    assert len(recipes(README, "sh")) == 2 and len(recipes(README, "python")) == 3
    assert len(recipes(CLIENT, "python")) == 2
