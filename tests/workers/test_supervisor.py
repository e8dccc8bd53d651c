"""Which workers a catalog and a machine's devices make."""

from pathlib import Path

import pytest

from jobs.catalog import Catalog, load_catalog
from jobs.errors import UnknownModel
from workers.supervisor import Post, posts


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """Three models: one worker a device, two workers, and one with a device of its own."""
    path = tmp_path / "models.toml"
    path.write_text(
        '[models.each]\npath = "./a"\n'
        '[models.two]\npath = "./b"\nworkers = 2\n'
        '[models.own]\npath = "./c"\nworkers = 1\ndevices = ["cuda:3"]\n'
    )
    return load_catalog(path)


def test_one_worker_a_device_unless_the_entry_says_otherwise(catalog: Catalog) -> None:
    places = posts(catalog, ["cuda:0", "cuda:1"])
    assert [p for p in places if p.model == "each"] == [
        Post("each", 0, "cuda:0"),
        Post("each", 1, "cuda:1"),
    ]
    assert [p.device for p in places if p.model == "two"] == ["cuda:0", "cuda:1"]
    assert [p.device for p in places if p.model == "own"] == ["cuda:3"]


def test_a_count_and_a_model_override_the_catalog(catalog: Catalog) -> None:
    assert posts(catalog, ["cpu"], only="two", count=3) == [Post("two", i, "cpu") for i in range(3)]


def test_an_unknown_model_is_named_with_the_known_ones(catalog: Catalog) -> None:
    with pytest.raises(UnknownModel, match="each, two, own"):
        posts(catalog, ["cpu"], only="three")
