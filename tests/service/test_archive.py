"""The archive of a job's images: the same bytes each time, in whole or in part."""

import io
import zipfile

import pytest

from tests.service.conftest import Deployment


def test_archive_download_can_be_resumed(deployment: Deployment) -> None:
    deployment.worker.finish_all()
    path = f"/v1/jobs/{deployment.submit('a', n=3)['id']}/images.zip"
    first, *others = deployment.worker.claim(3)
    deployment.worker.finish(first)
    partial_tag = deployment.client.get(path).headers["etag"]
    for lease in others:
        deployment.worker.finish(lease)
    whole = deployment.client.get(path)
    tag, size = whole.headers["etag"], len(whole.content)
    assert tag != partial_tag and whole.headers["accept-ranges"] == "bytes"
    head = deployment.client.head(path)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", tag)
    assert head.headers["content-length"] == str(size)
    middle = size // 2
    for asked, first_byte, last_byte in (
        (f"0-{middle - 1}", 0, middle - 1),
        (f"{middle}-", middle, size - 1),
        (f"{size - 1}-{size + 9}", size - 1, size - 1),
        ("-30", size - 30, size - 1),
        (f"-{size + 5}", 0, size - 1),
    ):
        part = deployment.client.get(path, headers={"Range": f"bytes={asked}", "If-Range": tag})
        assert part.status_code == 206, asked
        assert part.content == whole.content[first_byte : last_byte + 1]
        assert part.headers["content-range"] == f"bytes {first_byte}-{last_byte}/{size}"
        assert part.headers["content-length"] == str(len(part.content))
    with zipfile.ZipFile(io.BytesIO(whole.content)) as files:
        assert files.testzip() is None and len(files.namelist()) == 4


def test_archive_ranges_that_do_not_apply(deployment: Deployment) -> None:
    deployment.worker.finish_all()
    path = f"/v1/jobs/{deployment.submit('a')['id']}/images.zip"
    deployment.worker.finish_all()
    whole = deployment.client.get(path)
    for headers in (
        {"Range": "bytes=0-9", "If-Range": '"another"'},
        {"Range": "bytes=0-9,20-29"},
        {"Range": "lines=0-9"},
    ):
        response = deployment.client.get(path, headers=headers)
        assert (response.status_code, response.content) == (200, whole.content)
    outside = deployment.client.get(path, headers={"Range": f"bytes={len(whole.content)}-"})
    assert outside.status_code == 416
    assert outside.headers["content-range"] == f"bytes */{len(whole.content)}"
    known = deployment.client.get(path, headers={"If-None-Match": whole.headers["etag"]})
    assert (known.status_code, known.content) == (304, b"")


@pytest.mark.parametrize(("limit", "count_limit"), [(2**31, 2**16), (700, 2**16), (2**31, 3)])
def test_archive_length_is_known_in_every_format(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, limit: int, count_limit: int
) -> None:
    """Also in Zip64, for archives above 2 GiB or with more than 65,535 files."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", count_limit)
    deployment.worker.finish_all()
    path = f"/v1/jobs/{deployment.submit('a', n=4)['id']}/images.zip"
    deployment.worker.finish_all()
    monkeypatch.setattr("service.read.archive._manifest", lambda *_: {})
    response = deployment.client.get(path)
    assert int(response.headers["content-length"]) == len(response.content)
    with zipfile.ZipFile(io.BytesIO(response.content)) as files:
        assert files.testzip() is None and len(files.namelist()) == 5
