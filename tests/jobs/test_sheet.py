"""The grid of a contact sheet, and pictures fitted into its cells."""

from pathlib import Path

import pytest
from PIL import Image

from jobs.sheet import Grid, fitted, shrunk


def test_cells_have_gaps_on_all_sides() -> None:
    grid = Grid(count=5, columns=3, width=10, height=20, gap=2)
    assert [grid.place(position) for position in range(5)] == [
        (2, 2),
        (14, 2),
        (26, 2),
        (2, 24),
        (14, 24),
    ]
    page = grid.blank()
    assert (page.mode, page.size) == ("RGB", (2 + 3 * 12, 2 + 2 * 22))
    assert page.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("size", "expected"), [((400, 200), (100, 50)), ((10, 20), (50, 100)), ((100, 100), (100, 100))]
)
def test_pictures_are_fitted_to_their_cell(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    path = tmp_path / "picture.jpg"
    Image.new("L", size).save(path)
    picture = fitted(path, 100)
    assert (picture.mode, picture.size) == ("RGB", expected)


def test_small_pictures_are_not_enlarged() -> None:
    assert shrunk(Image.new("RGBA", (10, 20)), 100).size == (10, 20)
    assert shrunk(Image.new("RGBA", (1000, 2000)), 100).size == (50, 100)
