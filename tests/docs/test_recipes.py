"""The recipes of the README and of docs/client.md, run as they stand against a real service.

Only the address and the virtual environment's place are exchanged for the test's own.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.docs.pages import ROOT, blocks
from tests.end_to_end.mill import Mill, up
from tests.waiting import PATIENCE, wait_until

README, CLIENT = ROOT / "README.md", ROOT / "docs" / "client.md"


@pytest.fixture(scope="module")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mill]:
    with up(tmp_path_factory.mktemp("recipes") / "data") as mill:
        wait_until(mill.ready_workers)
        yield mill


def recipes(page: Path, language: str) -> list[str]:
    """The blocks of a page that want a running service; `make` and `up` are others' to test."""
    found = blocks(page.read_text(), language)
    return [one for one in found if not re.search(r"^make |imagemill up$", one, re.MULTILINE)]


def follow(mill: Mill, folder: Path, language: str, text: str) -> str:
    """Run one block in an empty folder; what it printed."""
    here = re.sub(r"(localhost|127\.0\.0\.1):8000", mill.url.removeprefix("http://"), text)
    binaries = str(Path(sys.executable).parent)
    here = here.replace(".venv/bin/", f"{binaries}/")
    program = ["bash", "-euc"] if language == "sh" else [sys.executable, "-c"]
    done = subprocess.run(
        [*program, here],
        cwd=folder,
        env={**os.environ, "IMAGEMILL_DATA": str(mill.data), "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


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
def test_a_recipe_makes_what_it_promises(
    mill: Mill, tmp_path: Path, page: Path, language: str, number: int, pictures: list[str]
) -> None:
    said = follow(mill, tmp_path, language, recipes(page, language)[number])
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (128, 128)
    if (page, language, number) == (README, "python", 2):
        assert sorted(said.split()) == ["shape-cross", "shape-star", "shape-triangle"]


def test_no_recipe_is_left_out() -> None:
    """A new one needs a line above; the catalog's blocks are TOML."""
    assert len(recipes(README, "sh")) == 2 and len(recipes(README, "python")) == 3
    assert len(recipes(CLIENT, "python")) == 2
