"""Image files: complete or absent, always inside the folder, removed with their job."""

import os
from pathlib import Path

import pytest

from jobs.errors import NotFound, StorageUnavailable
from jobs.image_store import LocalImages


@pytest.fixture
def images(tmp_path: Path) -> LocalImages:
    return LocalImages(tmp_path / "a" / "images")


def files_of(job_id: str, images: LocalImages) -> list[str] | None:
    """The names in a job's folder; None if there's no folder."""
    folder = images.path(f"{job_id}/x").parent
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else None


def test_written_images_can_be_read(images: LocalImages) -> None:
    uri = images.write("job1", 7, "3-ab", b"bytes", ".png")
    assert uri == "job1/7.3-ab.png"
    assert images.read(uri) == b"bytes"
    assert images.path(uri).parent.name == "job1"


def test_two_tokens_are_two_files(images: LocalImages) -> None:
    first, second = (images.write("job1", 0, token, token.encode(), ".png") for token in ("a", "b"))
    assert (images.read(first), images.read(second)) == (b"a", b"b")


def test_writing_again_replaces(images: LocalImages) -> None:
    images.write("job1", 0, "a", b"old", ".png")
    assert images.read(images.write("job1", 0, "a", b"new", ".png")) == b"new"


@pytest.mark.parametrize(
    "uri", ["", "x", "/etc/passwd", "../x", "job/../x", "a/b/c", "a/", "./a", "a/..", "a/b\n"]
)
def test_a_uri_that_leads_outside_is_refused(images: LocalImages, uri: str) -> None:
    for method in (images.path, images.read, images.remove):
        with pytest.raises(NotFound):
            method(uri)


@pytest.mark.parametrize("job_id", ["..", "a/b", "", "/tmp"])
def test_a_job_that_leads_outside_is_refused(images: LocalImages, job_id: str) -> None:
    with pytest.raises(NotFound):
        images.remove_job(job_id)
    with pytest.raises(NotFound):
        images.write(job_id, 0, "a", b"", ".png")


@pytest.mark.parametrize("suffix", ["png", "", "./x", ".PNG"])
def test_a_suffix_has_a_dot(images: LocalImages, suffix: str) -> None:
    with pytest.raises(ValueError, match="invalid file suffix"):
        images.write("job1", 0, "a", b"", suffix)


def test_removed_files_are_gone(images: LocalImages) -> None:
    uri = images.write("job1", 0, "a", b"", ".png")
    images.remove(uri)
    images.remove(uri)
    with pytest.raises(NotFound, match="is gone"):
        images.read(uri)


def test_a_jobs_files_go_together(images: LocalImages) -> None:
    other = images.write("job2", 0, "a", b"kept", ".png")
    images.write("job1", 0, "a", b"", ".png")
    images.remove_job("job1")
    images.remove_job("job1")
    assert files_of("job1", images) is None
    assert images.read(other) == b"kept"


def test_derived_files_are_removed_with_their_job(images: LocalImages) -> None:
    uri = images.write("job1", 0, "a", b"image", ".png")
    small = images.derived(uri, "small.jpg")
    images.keep(small, b"small")
    assert images.read(small) == b"small"
    images.remove_job("job1")
    images.keep(small, b"small")
    assert files_of("job1", images) is None


def test_a_full_disk_leaves_no_derived_file(
    images: LocalImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = images.write("job1", 0, "a", b"image", ".png")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    images.keep(images.derived(uri, "small.jpg"), b"small")
    assert files_of("job1", images) == [images.path(uri).name]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_no_partial_file(
    images: LocalImages, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    images.write("job1", 0, "first", b"", ".png")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), full)
    with pytest.raises(StorageUnavailable, match="No space left on device"):
        images.write("job1", 1, "a", b"bytes", ".png")
    monkeypatch.undo()
    assert files_of("job1", images) == ["0.first.png"]


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageUnavailable, match="cannot store images in"):
        LocalImages(tmp_path / "file" / "images")
