"""File names, and finding files that are already there."""

import hashlib
from pathlib import Path

import pytest

from imagemill.client.errors import CannotSave
from imagemill.client.file_names import file_name, place_for, slug, write_file


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A large red circle!", "a-large-red-circle"),
        ("  ../../etc/passwd\0", "etc-passwd"),
        ("ein Bär, 3 Äpfel", "ein-bär-3-äpfel"),
        ("赤い円", "赤い円"),
        ("—!?", "image"),
        ("", "image"),
        ("word " * 40, "word-word-word-word-word-word-word-word-word"),
        ("x" * 100, "x" * 48),
        ("𠀀" * 100, "𠀀" * 37),
    ],
)
def test_slug(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected


def test_names_sort_in_the_order_of_the_images() -> None:
    assert file_name(7, "a", ".png", 10) == "0007-a.png"
    assert file_name(7, "a", ".jpg", 10_001) == "00007-a.jpg"
    assert len({len(file_name(i, "a", ".png", 12_000)) for i in (0, 9_999, 11_999)}) == 1


def test_existing_files_are_found_and_never_overwritten(tmp_path: Path) -> None:
    path, mine, other = tmp_path / "0000-a.png", b"mine", b"other"
    digest = hashlib.sha256(mine).hexdigest()
    assert place_for(path, digest) == (path, False)
    write_file(path, other)
    second = tmp_path / "0000-a-2.png"
    assert place_for(path, digest) == (second, False)
    write_file(second, mine)
    assert place_for(path, digest) == (second, True)
    assert path.read_bytes() == other


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "child").touch()
    with pytest.raises(CannotSave, match="Is a directory"):
        write_file(target, b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
