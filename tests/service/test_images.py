"""Images over HTTP: bytes, ranges, preconditions, archives, contact sheets."""

import hashlib
import io
import json
import zipfile

import pytest
from PIL import Image, PngImagePlugin

from service.routes import images
from tests.service.conftest import Deployment, picture, pointers


@pytest.fixture(scope="module")
def finished(deployment: Deployment) -> tuple[str, bytes]:
    """A finished image: its path and its bytes."""
    job_id = deployment.submit("a")["id"]
    (lease,) = deployment.worker.claim()
    return f"/v1/jobs/{job_id}/images/0", deployment.worker.finish(lease)


def test_image_bytes_and_headers(deployment: Deployment, finished: tuple[str, bytes]) -> None:
    path, data = finished
    response = deployment.client.get(path)
    assert (response.status_code, response.content) == (200, data)
    assert response.headers["content-type"] == "image/png"
    assert response.headers["content-length"] == str(len(data))
    assert response.headers["etag"] == f'"{hashlib.sha256(data).hexdigest()}"'
    assert "immutable" in response.headers["cache-control"]
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["content-disposition"].startswith('inline; filename="')
    assert response.headers["content-disposition"].endswith('-00000.png"')


def test_head_has_no_image_body(deployment: Deployment, finished: tuple[str, bytes]) -> None:
    path, _ = finished
    get, head = (
        deployment.client.get(path),
        deployment.client.head(path, headers={"Range": "bytes=0-9"}),
    )
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers.pop("x-request-id") != get.headers.pop("x-request-id")
    assert dict(head.headers) == dict(get.headers)


def test_matching_if_none_match_is_304(deployment: Deployment, finished: tuple[str, bytes]) -> None:
    path, data = finished
    tag = f'"{hashlib.sha256(data).hexdigest()}"'
    for header in (tag, f"W/{tag}", f'"x", {tag}', "*"):
        for method in ("GET", "HEAD"):
            response = deployment.client.request(method, path, headers={"If-None-Match": header})
            assert (response.status_code, response.content) == (304, b""), header
            assert response.headers["etag"] == tag
            assert "immutable" in response.headers["cache-control"]
    assert deployment.client.get(path, headers={"If-None-Match": '"x"'}).status_code == 200


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-9", 0, 10),
        ("bytes=5-", 5, None),
        ("bytes=-7", -7, None),
        ("bytes=0-99999999", 0, None),
        ("bytes=-99999999", 0, None),
        ("bytes=10-19, 999999-", 10, 20),
    ],
)
def test_a_range(
    deployment: Deployment, finished: tuple[str, bytes], asked: str, first: int, last: int | None
) -> None:
    path, data = finished
    response = deployment.client.get(path, headers={"Range": asked})
    assert (response.status_code, response.content) == (206, data[first:last])
    assert response.headers["content-range"].endswith(f"/{len(data)}")


def test_several_ranges(deployment: Deployment, finished: tuple[str, bytes]) -> None:
    path, data = finished
    response = deployment.client.get(path, headers={"Range": "bytes=0-3, 10-13"})
    assert response.status_code == 206
    assert response.headers["content-type"].startswith("multipart/byteranges")
    assert data[:4] in response.content and data[10:14] in response.content


@pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=-0"])
def test_unsatisfiable_range_is_416(
    deployment: Deployment, finished: tuple[str, bytes], asked: str
) -> None:
    path, data = finished
    response = deployment.client.get(path, headers={"Range": asked})
    assert response.status_code == 416
    assert response.headers["content-range"] == f"bytes */{len(data)}"
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("asked", ["bytes", "bytes=", "bytes=9-1", "lines=1-2", "bytes=a-b", "x"])
def test_malformed_range_is_ignored(
    deployment: Deployment, finished: tuple[str, bytes], asked: str
) -> None:
    path, data = finished
    response = deployment.client.get(path, headers={"Range": asked})
    assert (response.status_code, response.content) == (200, data)


def test_if_range(deployment: Deployment, finished: tuple[str, bytes]) -> None:
    path, data = finished
    tag = hashlib.sha256(data).hexdigest()
    same = deployment.client.get(path, headers={"Range": "bytes=0-3", "If-Range": f'"{tag}"'})
    other = deployment.client.get(path, headers={"Range": "bytes=99999999-", "If-Range": '"x"'})
    assert (same.status_code, other.status_code, other.content) == (206, 200, data)


def test_unfinished_image_is_409(deployment: Deployment) -> None:
    deployment.worker.finish_all()
    path = f"/v1/jobs/{deployment.submit('a')['id']}/images/0"
    assert deployment.client.get(path).status_code == 409
    deployment.worker.claim()
    response = deployment.client.get(path)
    assert (response.status_code, "running" in response.json()["detail"]) == (409, True)


def test_unknown_image_is_404(deployment: Deployment, finished: tuple[str, bytes]) -> None:
    path = finished[0].removesuffix("0")
    for index in ("1", "-1", "99999999999999999999"):
        assert deployment.client.get(path + index).status_code == 404, index
    for index in ("x", "1.5", "9" * 5000):
        response = deployment.client.get(path + index)
        assert (response.status_code, pointers(response)) == (422, ["/path/index"])


def test_failed_image_is_404_with_its_error(deployment: Deployment) -> None:
    deployment.worker.finish_all()
    job_id = deployment.submit("a")["id"]
    (lease,) = deployment.worker.claim()
    deployment.worker.fail(lease, "the picture came out as NaN")
    response = deployment.client.get(f"/v1/jobs/{job_id}/images/0")
    assert (response.status_code, "NaN" in response.json()["detail"]) == (404, True)


def test_image_without_its_file_is_410(deployment: Deployment) -> None:
    deployment.worker.finish_all()
    job_id = deployment.submit("a")["id"]
    deployment.worker.finish_all()
    deployment.images.remove_job(job_id)
    response = deployment.client.get(f"/v1/jobs/{job_id}/images/0")
    assert (response.status_code, response.json()["title"]) == (410, "Gone")


def test_preview_is_the_latest_from_the_worker(deployment: Deployment) -> None:
    deployment.worker.finish_all()
    job_id = deployment.submit("a")["id"]
    path = f"/v1/jobs/{job_id}/images/0/preview"
    waiting = deployment.client.get(path)
    assert (waiting.status_code, waiting.headers["retry-after"]) == (404, "1")
    (lease,) = deployment.worker.claim()
    held = {(lease.key, lease.token): 1}
    assert not deployment.store.beat("hand", held, 60).wished
    nothing = deployment.client.get(path)
    assert (nothing.status_code, nothing.content) == (204, b"")
    assert (nothing.headers["retry-after"], nothing.headers["cache-control"]) == ("1", "no-store")
    assert deployment.store.beat("hand", held, 60).wished == {lease.key}
    for shade in (1, 2):
        drawn = picture(16, 16, shade)
        deployment.images.write(job_id, 0, "preview", drawn, ".jpg")
        response = deployment.client.get(path)
        assert (response.content, response.headers["content-type"]) == (drawn, "image/jpeg")
        assert response.headers["cache-control"] == "no-store"
    data = deployment.worker.finish(lease)
    there = deployment.client.get(path, follow_redirects=False)
    assert (there.status_code, there.headers["location"]) == (303, path[: -len("/preview")])
    assert deployment.client.get(path).content == data
    for index in ("1", "-1", "9" * 30):
        missing = deployment.client.get(f"/v1/jobs/{job_id}/images/{index}/preview")
        assert missing.status_code == 404


def test_preview_of_a_failed_image_is_404(deployment: Deployment) -> None:
    deployment.worker.finish_all()
    path = f"/v1/jobs/{deployment.submit('a')['id']}/images/0/preview"
    (lease,) = deployment.worker.claim()
    deployment.worker.fail(lease)
    response = deployment.client.get(path)
    assert (response.status_code, "failed" in response.json()["detail"]) == (404, True)


def test_thumbnail_is_small_and_immutable(deployment: Deployment) -> None:
    deployment.worker.finish_all()
    job_id = deployment.submit("a")["id"]
    (lease,) = deployment.worker.claim()
    data = deployment.worker.finish(lease, picture(640, 320))
    path = f"/v1/jobs/{job_id}/images/0/thumbnail"
    digest = hashlib.sha256(data).hexdigest()
    for query, size in (("", (256, 128)), ("?side=64", (64, 32)), ("?side=512", (512, 256))):
        response = deployment.client.get(path + query)
        assert (response.status_code, response.headers["content-type"]) == (200, "image/jpeg")
        assert Image.open(io.BytesIO(response.content)).size == size
        assert response.headers["etag"] == f'"{digest}-{size[0]}"'
        assert "immutable" in response.headers["cache-control"]
        again = deployment.client.get(
            path + query, headers={"If-None-Match": response.headers["etag"]}
        )
        assert (again.status_code, again.content) == (304, b"")
    other = deployment.client.get(path, headers={"If-None-Match": f'"{digest}-64"'})
    assert other.status_code == 200


def test_thumbnail_is_drawn_once_and_deleted_with_its_job(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment.worker.finish_all()
    job_id = deployment.submit("a")["id"]
    deployment.worker.finish_all()
    path = f"/v1/jobs/{job_id}/images/0/thumbnail"
    first = deployment.client.get(path)
    monkeypatch.setattr("service.read.thumbnails._shrunk", None)
    assert deployment.client.get(path).content == first.content
    deployment.images.remove_job(job_id)
    assert deployment.client.get(path).status_code == 410


def test_thumbnail_is_never_larger_than_its_image(deployment: Deployment) -> None:
    deployment.worker.finish_all()
    job_id = deployment.submit("a")["id"]
    (lease,) = deployment.worker.claim()
    deployment.worker.finish(lease, picture(96, 32))
    response = deployment.client.get(f"/v1/jobs/{job_id}/images/0/thumbnail?side=256")
    assert Image.open(io.BytesIO(response.content)).size == (96, 32)


def test_invalid_thumbnail_requests(deployment: Deployment) -> None:
    deployment.worker.finish_all()
    path = f"/v1/jobs/{deployment.submit('a')['id']}/images/0/thumbnail"
    assert deployment.client.get(path).status_code == 409
    assert deployment.client.get(path.replace("/0/", "/1/")).status_code == 404
    for query in ("side=0", "side=65", "side=100000", "side=x", "size=64"):
        response = deployment.client.get(f"{path}?{query}")
        name = query.split("=")[0]
        assert (response.status_code, pointers(response)) == (422, [f"/query/{name}"])


RECIPE = {"prompt": "ä", "seed": 7, "versions": {"torch": "2"}, "tiled": False}


def with_recipe(text: str = json.dumps(RECIPE)) -> bytes:
    """A PNG with a recipe."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("imagemill", text)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def test_recipe_is_read_from_the_file(deployment: Deployment) -> None:
    deployment.worker.finish_all()
    path = f"/v1/jobs/{deployment.submit('a')['id']}/images/0/recipe"
    assert deployment.client.get(path).status_code == 409
    (lease,) = deployment.worker.claim()
    deployment.worker.finish(lease, with_recipe())
    response = deployment.client.get(path)
    assert (response.status_code, response.json()) == (200, RECIPE)
    assert response.headers["content-type"] == "application/json"
    assert "immutable" in response.headers["cache-control"]
    again = deployment.client.get(path, headers={"If-None-Match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert deployment.client.get(path.replace("/0/", "/1/")).status_code == 404


@pytest.mark.parametrize("data", [picture(), with_recipe("no json"), with_recipe("[]"), b"x"])
def test_file_without_a_recipe_is_404(deployment: Deployment, data: bytes) -> None:
    deployment.worker.finish_all()
    job = deployment.submit("a")["urls"]
    (lease,) = deployment.worker.claim()
    deployment.worker.finish(lease, data)
    response = deployment.client.get(f"{job['self']}/images/0/recipe")
    assert (response.status_code, "no recipe" in response.json()["detail"]) == (404, True)
    with zipfile.ZipFile(io.BytesIO(deployment.client.get(job["zip"]).content)) as archive:
        assert json.loads(archive.read("manifest.json"))["images"][0]["recipe"] is None


@pytest.mark.parametrize("index", ["+0", "00", "-0", "0.0", "1e0", "%D9%A3", "0x0", "%200"])
def test_noncanonical_index_is_422(
    deployment: Deployment, finished: tuple[str, bytes], index: str
) -> None:
    path = finished[0].removesuffix("0") + index
    for more in ("", "/thumbnail", "/preview", "/recipe"):
        response = deployment.client.get(path + more)
        assert (response.status_code, pointers(response)) == (422, ["/path/index"])


def test_archive_has_finished_images_and_manifest(deployment: Deployment) -> None:
    deployment.worker.finish_all()
    job_id = deployment.submit("ä", "b", "c", metadata={"k": "ü"})["id"]
    first, second, _ = deployment.worker.claim(3)
    data = deployment.worker.finish(first, with_recipe())
    deployment.worker.fail(second, "no")
    response = deployment.client.get(f"/v1/jobs/{job_id}/images.zip")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/zip"
    assert int(response.headers["content-length"]) == len(response.content)
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["manifest.json", "00000.png"]
        assert archive.read("00000.png") == data
        manifest = json.loads(archive.read("manifest.json"))
    assert (manifest["job"], manifest["metadata"]) == (job_id, {"k": "ü"})
    good, bad, going = manifest["images"]
    assert (good["file"], good["prompt"]) == ("00000.png", "ä")
    assert good["sha256"] == hashlib.sha256(data).hexdigest()
    assert (bad["file"], bad["error"], going["state"]) == (None, "no", "running")
    assert isinstance(good["seed"], int)
    assert [image["recipe"] for image in manifest["images"]] == [RECIPE, None, None]


def test_sheet_shows_a_page_of_thumbnails(deployment: Deployment) -> None:
    deployment.worker.finish_all()
    job_id = deployment.submit("a", n=7)["id"]
    deployment.worker.finish_all()
    path = f"/v1/jobs/{job_id}/sheet.png"
    square, strip = deployment.client.get(path), deployment.client.get(f"{path}?columns=7")
    assert square.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(square.content)).size == (3 * 168 + 8, 3 * 168 + 8)
    assert Image.open(io.BytesIO(strip.content)).size == (7 * 168 + 8, 168 + 8)
    assert deployment.client.get(f"{path}?page=1").status_code == 404


def test_unchanged_sheet_is_304(deployment: Deployment) -> None:
    deployment.worker.finish_all()
    path = f"/v1/jobs/{deployment.submit('a', n=2)['id']}/sheet.png"
    first, second = deployment.worker.claim(2)
    deployment.worker.finish(first)
    tag = {"If-None-Match": deployment.client.get(path).headers["etag"]}
    again = deployment.client.get(path, headers=tag)
    assert (again.status_code, again.content) == (304, b"")
    assert deployment.client.get(f"{path}?columns=2", headers=tag).status_code == 200
    deployment.worker.finish(second)
    assert deployment.client.get(path, headers=tag).status_code == 200


def test_sheet_pages(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "SHEET_IMAGES", 2)
    deployment.worker.finish_all()
    path = f"/v1/jobs/{deployment.submit('a', n=3)['id']}/sheet.png"
    deployment.worker.finish_all()
    sizes = []
    for page in range(2):
        response = deployment.client.get(f"{path}?page={page}&columns=1")
        sizes.append(Image.open(io.BytesIO(response.content)).height)
    assert sizes == [2 * 168 + 8, 168 + 8]
    assert deployment.client.get(f"{path}?page=2").status_code == 404


@pytest.mark.parametrize("query", ["page=-1", "columns=0", "columns=21", "columns=x", "rows=1"])
def test_invalid_sheet_query_is_422(deployment: Deployment, query: str) -> None:
    job_id = deployment.submit("a")["id"]
    assert deployment.client.get(f"/v1/jobs/{job_id}/sheet.png?{query}").status_code == 422


def test_archive_and_sheet_without_images_are_409(deployment: Deployment) -> None:
    job_id = deployment.submit("a")["id"]
    for name in ("images.zip", "sheet.png"):
        assert deployment.client.get(f"/v1/jobs/{job_id}/{name}").status_code == 409


def test_warnings_of_an_image_are_in_the_job_and_the_manifest(fresh: Deployment) -> None:
    job_id = fresh.submit("a", "b")["id"]
    first, second = fresh.worker.claim(2)
    fresh.worker.finish(first, warnings=("it was cut",))
    fresh.worker.finish(second)
    images = fresh.job(job_id)["images"]
    assert [image["warnings"] for image in images] == [["it was cut"], []]
    archive = fresh.client.get(f"/v1/jobs/{job_id}/images.zip").content
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        manifest = json.loads(files.read("manifest.json"))
    assert [image["warnings"] for image in manifest["images"]] == [["it was cut"], []]
