"""The pictures over HTTP: bytes, ranges, preconditions, the archive, the contact sheet."""

import hashlib
import io
import json
import zipfile

import pytest
from PIL import Image, PngImagePlugin

from service.routes import images
from tests.service.conftest import Deployment, picture, pointers


@pytest.fixture(scope="module")
def made(mill: Deployment) -> tuple[str, bytes]:
    """A finished image: its path and its bytes."""
    job_id = mill.submit("a")["id"]
    (lease,) = mill.worker.claim()
    return f"/v1/jobs/{job_id}/images/0", mill.worker.finish(lease)


def test_the_bytes_and_what_is_said_of_them(mill: Deployment, made: tuple[str, bytes]) -> None:
    path, data = made
    answer = mill.client.get(path)
    assert (answer.status_code, answer.content) == (200, data)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-length"] == str(len(data))
    assert answer.headers["etag"] == f'"{hashlib.sha256(data).hexdigest()}"'
    assert "immutable" in answer.headers["cache-control"]
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-disposition"].startswith('inline; filename="')
    assert answer.headers["content-disposition"].endswith('-00000.png"')


def test_head_is_get_without_the_body(mill: Deployment, made: tuple[str, bytes]) -> None:
    path, _ = made
    got, asked = mill.client.get(path), mill.client.head(path, headers={"Range": "bytes=0-9"})
    assert (asked.status_code, asked.content) == (200, b"")
    assert asked.headers.pop("x-request-id") != got.headers.pop("x-request-id")
    assert dict(asked.headers) == dict(got.headers)


def test_if_none_match_is_304(mill: Deployment, made: tuple[str, bytes]) -> None:
    path, data = made
    tag = f'"{hashlib.sha256(data).hexdigest()}"'
    for header in (tag, f"W/{tag}", f'"x", {tag}', "*"):
        for method in ("GET", "HEAD"):
            answer = mill.client.request(method, path, headers={"If-None-Match": header})
            assert (answer.status_code, answer.content) == (304, b""), header
            assert answer.headers["etag"] == tag
            assert "immutable" in answer.headers["cache-control"]
    assert mill.client.get(path, headers={"If-None-Match": '"x"'}).status_code == 200


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
    mill: Deployment, made: tuple[str, bytes], asked: str, first: int, last: int | None
) -> None:
    path, data = made
    answer = mill.client.get(path, headers={"Range": asked})
    assert (answer.status_code, answer.content) == (206, data[first:last])
    assert answer.headers["content-range"].endswith(f"/{len(data)}")


def test_several_ranges(mill: Deployment, made: tuple[str, bytes]) -> None:
    path, data = made
    answer = mill.client.get(path, headers={"Range": "bytes=0-3, 10-13"})
    assert answer.status_code == 206
    assert answer.headers["content-type"].startswith("multipart/byteranges")
    assert data[:4] in answer.content and data[10:14] in answer.content


@pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=-0"])
def test_a_range_of_nothing_is_416(mill: Deployment, made: tuple[str, bytes], asked: str) -> None:
    path, data = made
    answer = mill.client.get(path, headers={"Range": asked})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{len(data)}"
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("asked", ["bytes", "bytes=", "bytes=9-1", "lines=1-2", "bytes=a-b", "x"])
def test_a_range_that_is_none_is_ignored(
    mill: Deployment, made: tuple[str, bytes], asked: str
) -> None:
    path, data = made
    answer = mill.client.get(path, headers={"Range": asked})
    assert (answer.status_code, answer.content) == (200, data)


def test_if_range(mill: Deployment, made: tuple[str, bytes]) -> None:
    path, data = made
    tag = hashlib.sha256(data).hexdigest()
    same = mill.client.get(path, headers={"Range": "bytes=0-3", "If-Range": f'"{tag}"'})
    other = mill.client.get(path, headers={"Range": "bytes=99999999-", "If-Range": '"x"'})
    assert (same.status_code, other.status_code, other.content) == (206, 200, data)


def test_an_image_that_is_not_finished_is_409(mill: Deployment) -> None:
    mill.worker.finish_all()
    path = f"/v1/jobs/{mill.submit('a')['id']}/images/0"
    assert mill.client.get(path).status_code == 409
    mill.worker.claim()
    answer = mill.client.get(path)
    assert (answer.status_code, "running" in answer.json()["detail"]) == (409, True)


def test_an_image_that_never_was_is_404(mill: Deployment, made: tuple[str, bytes]) -> None:
    path = made[0].removesuffix("0")
    for index in ("1", "-1", "99999999999999999999"):
        assert mill.client.get(path + index).status_code == 404, index
    for index in ("x", "1.5", "9" * 5000):
        answer = mill.client.get(path + index)
        assert (answer.status_code, pointers(answer)) == (422, ["/path/index"])


def test_an_image_that_failed_is_404_and_says_why(mill: Deployment) -> None:
    mill.worker.finish_all()
    job_id = mill.submit("a")["id"]
    (lease,) = mill.worker.claim()
    mill.worker.fail(lease, "the picture came out as NaN")
    answer = mill.client.get(f"/v1/jobs/{job_id}/images/0")
    assert (answer.status_code, "NaN" in answer.json()["detail"]) == (404, True)


def test_an_image_whose_file_is_gone_is_410(mill: Deployment) -> None:
    mill.worker.finish_all()
    job_id = mill.submit("a")["id"]
    mill.worker.finish_all()
    mill.images.remove_job(job_id)
    answer = mill.client.get(f"/v1/jobs/{job_id}/images/0")
    assert (answer.status_code, answer.json()["title"]) == (410, "Gone")


def test_a_preview_is_what_a_worker_last_showed(mill: Deployment) -> None:
    mill.worker.finish_all()
    job_id = mill.submit("a")["id"]
    path = f"/v1/jobs/{job_id}/images/0/preview"
    waiting = mill.client.get(path)
    assert (waiting.status_code, waiting.headers["retry-after"]) == (404, "1")
    (lease,) = mill.worker.claim()
    held = {(lease.key, lease.token): 1}
    assert not mill.store.beat("hand", held, 60).wished
    nothing = mill.client.get(path)
    assert (nothing.status_code, nothing.content) == (204, b"")
    assert (nothing.headers["retry-after"], nothing.headers["cache-control"]) == ("1", "no-store")
    assert mill.store.beat("hand", held, 60).wished == {lease.key}
    for shade in (1, 2):
        drawn = picture(16, 16, shade)
        mill.images.write(job_id, 0, "preview", drawn, ".jpg")
        answer = mill.client.get(path)
        assert (answer.content, answer.headers["content-type"]) == (drawn, "image/jpeg")
        assert answer.headers["cache-control"] == "no-store"
    data = mill.worker.finish(lease)
    there = mill.client.get(path, follow_redirects=False)
    assert (there.status_code, there.headers["location"]) == (303, path[: -len("/preview")])
    assert mill.client.get(path).content == data
    for index in ("1", "-1", "9" * 30):
        missing = mill.client.get(f"/v1/jobs/{job_id}/images/{index}/preview")
        assert missing.status_code == 404


def test_a_preview_of_what_was_not_made_is_404(mill: Deployment) -> None:
    mill.worker.finish_all()
    path = f"/v1/jobs/{mill.submit('a')['id']}/images/0/preview"
    (lease,) = mill.worker.claim()
    mill.worker.fail(lease)
    answer = mill.client.get(path)
    assert (answer.status_code, "failed" in answer.json()["detail"]) == (404, True)


def test_a_thumbnail_is_small_and_for_ever(mill: Deployment) -> None:
    mill.worker.finish_all()
    job_id = mill.submit("a")["id"]
    (lease,) = mill.worker.claim()
    data = mill.worker.finish(lease, picture(640, 320))
    path = f"/v1/jobs/{job_id}/images/0/thumbnail"
    digest = hashlib.sha256(data).hexdigest()
    for query, size in (("", (256, 128)), ("?side=64", (64, 32)), ("?side=512", (512, 256))):
        answer = mill.client.get(path + query)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
        assert Image.open(io.BytesIO(answer.content)).size == size
        assert answer.headers["etag"] == f'"{digest}-{size[0]}"'
        assert "immutable" in answer.headers["cache-control"]
        again = mill.client.get(path + query, headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    other = mill.client.get(path, headers={"If-None-Match": f'"{digest}-64"'})
    assert other.status_code == 200


def test_a_thumbnail_is_drawn_once_and_goes_with_its_job(
    mill: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    mill.worker.finish_all()
    job_id = mill.submit("a")["id"]
    mill.worker.finish_all()
    path = f"/v1/jobs/{job_id}/images/0/thumbnail"
    first = mill.client.get(path)
    monkeypatch.setattr("service.read.thumbnails._drawn", None)
    assert mill.client.get(path).content == first.content
    mill.images.remove_job(job_id)
    assert mill.client.get(path).status_code == 410


def test_a_thumbnail_is_never_larger_than_its_image(mill: Deployment) -> None:
    mill.worker.finish_all()
    job_id = mill.submit("a")["id"]
    (lease,) = mill.worker.claim()
    mill.worker.finish(lease, picture(96, 32))
    answer = mill.client.get(f"/v1/jobs/{job_id}/images/0/thumbnail?side=256")
    assert Image.open(io.BytesIO(answer.content)).size == (96, 32)


def test_a_thumbnail_that_cannot_be(mill: Deployment) -> None:
    mill.worker.finish_all()
    path = f"/v1/jobs/{mill.submit('a')['id']}/images/0/thumbnail"
    assert mill.client.get(path).status_code == 409
    assert mill.client.get(path.replace("/0/", "/1/")).status_code == 404
    for query in ("side=0", "side=65", "side=100000", "side=x", "size=64"):
        answer = mill.client.get(f"{path}?{query}")
        name = query.split("=")[0]
        assert (answer.status_code, pointers(answer)) == (422, [f"/query/{name}"])


RECIPE = {"prompt": "ä", "seed": 7, "versions": {"torch": "2"}, "tiled": False}


def with_recipe(text: str = json.dumps(RECIPE)) -> bytes:
    """A PNG that says how it was made."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("imagemill", text)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def test_the_recipe_is_the_one_in_the_file(mill: Deployment) -> None:
    mill.worker.finish_all()
    path = f"/v1/jobs/{mill.submit('a')['id']}/images/0/recipe"
    assert mill.client.get(path).status_code == 409
    (lease,) = mill.worker.claim()
    mill.worker.finish(lease, with_recipe())
    answer = mill.client.get(path)
    assert (answer.status_code, answer.json()) == (200, RECIPE)
    assert answer.headers["content-type"] == "application/json"
    assert "immutable" in answer.headers["cache-control"]
    again = mill.client.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert mill.client.get(path.replace("/0/", "/1/")).status_code == 404


@pytest.mark.parametrize("data", [picture(), with_recipe("no json"), with_recipe("[]"), b"x"])
def test_a_file_without_a_recipe_has_none_to_give(mill: Deployment, data: bytes) -> None:
    mill.worker.finish_all()
    job = mill.submit("a")["urls"]
    (lease,) = mill.worker.claim()
    mill.worker.finish(lease, data)
    answer = mill.client.get(f"{job['self']}/images/0/recipe")
    assert (answer.status_code, "no recipe" in answer.json()["detail"]) == (404, True)
    with zipfile.ZipFile(io.BytesIO(mill.client.get(job["zip"]).content)) as archive:
        assert json.loads(archive.read("manifest.json"))["images"][0]["recipe"] is None


@pytest.mark.parametrize("index", ["+0", "00", "-0", "0.0", "1e0", "%D9%A3", "0x0", "%200"])
def test_an_index_is_written_in_one_way_only(
    mill: Deployment, made: tuple[str, bytes], index: str
) -> None:
    path = made[0].removesuffix("0") + index
    for more in ("", "/thumbnail", "/preview", "/recipe"):
        answer = mill.client.get(path + more)
        assert (answer.status_code, pointers(answer)) == (422, ["/path/index"])


def test_the_archive_holds_the_finished_images_and_a_manifest(mill: Deployment) -> None:
    mill.worker.finish_all()
    job_id = mill.submit("ä", "b", "c", metadata={"k": "ü"})["id"]
    first, second, _ = mill.worker.claim(3)
    data = mill.worker.finish(first, with_recipe())
    mill.worker.fail(second, "no")
    answer = mill.client.get(f"/v1/jobs/{job_id}/images.zip")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/zip"
    assert int(answer.headers["content-length"]) == len(answer.content)
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
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
    assert [one["recipe"] for one in manifest["images"]] == [RECIPE, None, None]


def test_the_sheet_shows_a_page_of_thumbnails(mill: Deployment) -> None:
    mill.worker.finish_all()
    job_id = mill.submit("a", n=7)["id"]
    mill.worker.finish_all()
    path = f"/v1/jobs/{job_id}/sheet.png"
    square, strip = mill.client.get(path), mill.client.get(f"{path}?columns=7")
    assert square.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(square.content)).size == (3 * 168 + 8, 3 * 168 + 8)
    assert Image.open(io.BytesIO(strip.content)).size == (7 * 168 + 8, 168 + 8)
    assert mill.client.get(f"{path}?page=1").status_code == 404


def test_a_sheet_that_the_caller_has_is_304(mill: Deployment) -> None:
    mill.worker.finish_all()
    path = f"/v1/jobs/{mill.submit('a', n=2)['id']}/sheet.png"
    first, second = mill.worker.claim(2)
    mill.worker.finish(first)
    tag = {"If-None-Match": mill.client.get(path).headers["etag"]}
    again = mill.client.get(path, headers=tag)
    assert (again.status_code, again.content) == (304, b"")
    assert mill.client.get(f"{path}?columns=2", headers=tag).status_code == 200
    mill.worker.finish(second)
    assert mill.client.get(path, headers=tag).status_code == 200


def test_a_sheet_has_as_many_pages_as_it_takes(
    mill: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "SHEET_IMAGES", 2)
    mill.worker.finish_all()
    path = f"/v1/jobs/{mill.submit('a', n=3)['id']}/sheet.png"
    mill.worker.finish_all()
    sizes = []
    for page in range(2):
        answer = mill.client.get(f"{path}?page={page}&columns=1")
        sizes.append(Image.open(io.BytesIO(answer.content)).height)
    assert sizes == [2 * 168 + 8, 168 + 8]
    assert mill.client.get(f"{path}?page=2").status_code == 404


@pytest.mark.parametrize("query", ["page=-1", "columns=0", "columns=21", "columns=x", "rows=1"])
def test_a_sheet_that_cannot_be_is_422(mill: Deployment, query: str) -> None:
    job_id = mill.submit("a")["id"]
    assert mill.client.get(f"/v1/jobs/{job_id}/sheet.png?{query}").status_code == 422


def test_archive_and_sheet_of_nothing_are_409(mill: Deployment) -> None:
    job_id = mill.submit("a")["id"]
    for name in ("images.zip", "sheet.png"):
        assert mill.client.get(f"/v1/jobs/{job_id}/{name}").status_code == 409
