"""A fake server that keeps jobs in memory and finishes one image per poll.

It has the routes that the client uses, with the service's response formats. To test retries, the
statuses in `script` are returned before anything else.
"""

import hashlib
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


def picture(seed: int) -> bytes:
    """A small PNG whose colour depends on the seed."""
    out = io.BytesIO()
    colour = (seed * 53 % 256, seed * 101 % 256, seed * 197 % 256)
    Image.new("RGB", (32, 32), colour).save(out, "PNG")
    return out.getvalue()


class FakeServer:
    """A context manager; `url` is the server's address.

    `streams`: if it's a list, event streams are available and each one's Last-Event-ID is appended.
    `briefs` counts polls without images. `fails` are prompts whose images fail. `holds` stops
    images from finishing. `pictures` replaces the bytes of the first images. `workers` is the
    response of /v1/workers. `preview` is that of running images: without one, images finish without
    having been running; with one, they run until it was requested. `moves` advances all images by a
    step per poll. `notes` are a new job's warnings, and `warnings` those of finished images, by
    prompt. `calls` counts requests by method and path, without ids.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, str] = {}
        self.fails: set[str] = set()
        self.holds = False
        self.streams: list[str | None] | None = None
        self.briefs = 0
        self.pictures: list[bytes] = []
        self.preview: bytes | None = None
        self.moves = False
        self.previewed: set[int] = set()
        self.script: list[tuple[int, dict[str, str]]] = []
        self.workers: list[dict[str, Any]] = [{"id": "w", "model": "demo", "state": "ready"}]
        self.notes: list[str] = []
        self.warnings: dict[str, list[str]] = {}
        self.calls: dict[str, int] = {}
        self.bodies: list[dict[str, Any]] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "FakeServer":
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                match = re.fullmatch(r"/v1/jobs/(job-\d+)/events", self.path)
                if match is not None and fake.streams is not None:
                    self._stream(match[1])
                else:
                    self._answer("GET", None)

            def _stream(self, job_id: str) -> None:
                """Send the finished images once each, then end the stream."""
                fake.streams.append(self.headers.get("Last-Event-ID"))
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                after = int(self.headers.get("Last-Event-ID") or 0)
                for number, image in enumerate(fake.finished(job_id)[after:], after + 1):
                    frame = f"event: image\nid: {number}\ndata: {json.dumps(image)}\n\n"
                    self.wfile.write(frame.encode())

            def do_DELETE(self) -> None:
                self._answer("DELETE", None)

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                text = self.rfile.read(length)
                self._answer("POST", json.loads(text) if text else None)

            def _answer(self, method: str, body: Any) -> None:
                path = self.path.split("?")[0]
                status, content, headers = fake.answer(method, path, body, dict(self.headers))
                if self.path.endswith("images=none") and status == 200:
                    fake.briefs += 1
                    content = {**content, "images": []}
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                return

        return Handler

    def answer(
        self, method: str, path: str, body: Any, headers: dict[str, str]
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body and headers of the response to a request."""
        name = f"{method} {re.sub(r'job-[0-9]+', 'ID', path)}"
        self.calls[name] = self.calls.get(name, 0) + 1
        if self.script:
            status, extra = self.script.pop(0)
            return status, {"title": "for now", "status": status}, extra
        if method == "POST" and path == "/v1/jobs":
            return self._submit(body, headers)
        if path == "/healthz":
            return 200, {"status": "ok"}, {}
        if path == "/v1/workers":
            return 200, {"data": self.workers}, {}
        if path == "/v1/models":
            return 200, {"data": [{"id": "demo"}]}, {}
        if path == "/v1/jobs":
            return 200, {"data": list(self.jobs.values()), "next": None}, {}
        match = re.fullmatch(r"/v1/jobs/(job-\d+)(?:/(\w+)(?:/(\d+)(/preview)?)?)?", path)
        if match is None or match[1] not in self.jobs or match[2] == "events":
            return 404, {"title": "Not Found", "status": 404, "detail": f"nothing at {path}"}, {}
        return self._of_job(self.jobs[match[1]], method, match[2], match[3], bool(match[4]))

    def _submit(self, body: Any, headers: dict[str, str]) -> tuple[int, Any, dict[str, str]]:
        self.bodies.append(body)
        key = headers.get("Idempotency-Key", "")
        if key in self.keys:
            return 202, self.jobs[self.keys[key]], {}
        entries = [{"prompt": p} if isinstance(p, str) else p for p in body["prompts"]]
        bad = [
            {"pointer": f"/prompts/{i}/width", "detail": "width must be a multiple of 16"}
            for i, entry in enumerate(entries)
            if entry.get("width", 16) % 16
        ]
        if bad:
            return 422, {"title": "Unprocessable", "detail": "bad fields", "errors": bad}, {}
        job_id = f"job-{len(self.jobs) + 1}"
        images = [self._image(i, e["prompt"]) for i, e in enumerate(entries)]
        job = {"id": job_id, "model": body["model"], "images": images, "created": 1.75e9}
        job["metadata"] = body.get("metadata", {})
        self.jobs[job_id] = job
        self.keys[key] = job_id
        return 202, {**self._counted(job), "warnings": self.notes}, {}

    def _image(self, index: int, prompt: str) -> dict[str, Any]:
        return {
            "index": index,
            "prompt": prompt,
            "seed": 7 + index,
            "state": "queued",
            "step": 0,
            "steps": 4,
            "sha256": None,
            "media_type": None,
            "seconds": None,
            "error": None,
        }

    def _of_job(
        self,
        job: dict[str, Any],
        method: str,
        verb: str | None,
        index: str | None,
        is_preview: bool,
    ) -> tuple[int, Any, dict[str, str]]:
        if method == "DELETE":
            del self.jobs[job["id"]]
            return 204, b"", {}
        if index is not None and is_preview:
            self.previewed.add(int(index))
            return (200, self.preview, {}) if self.preview else (404, {"title": "none"}, {})
        if index is not None:
            return 200, self._bytes(job["images"][int(index)]), {"Content-Type": "image/png"}
        if verb == "cancel":
            self._move(job, {"queued", "running"}, "cancelled")
        elif verb == "retry":
            self._move(job, {"failed", "cancelled"}, "queued")
        elif self.moves:
            self._move_all(job)
        else:
            self._make_one(job)
        return 200, self._counted(job), {}

    def _move(self, job: dict[str, Any], states: set[str], state: str) -> None:
        for image in job["images"]:
            if image["state"] in states:
                image.update(state=state, error=None)

    def _make_one(self, job: dict[str, Any]) -> None:
        if self.preview is not None:
            for image in job["images"]:
                if image["state"] == "queued":
                    image.update(state="running", step=2)
        waiting = [
            image
            for image in job["images"]
            if image["state"] == "queued"
            or (image["state"] == "running" and image["index"] in self.previewed)
        ]
        if not waiting or self.holds:
            return
        image = waiting[0]
        if image["prompt"] in self.fails:
            image.update(state="failed", error="the latents are not numbers")
            return
        self._made(image)

    def _move_all(self, job: dict[str, Any]) -> None:
        for image in job["images"]:
            if image["state"] == "running" and image["step"] == 3:
                self._made(image)
            elif image["state"] in ("queued", "running"):
                image.update(state="running", step=image["step"] + 1)

    def _made(self, image: dict[str, Any]) -> None:
        sha256 = hashlib.sha256(self._bytes(image)).hexdigest()
        made = {"state": "succeeded", "step": 4, "sha256": sha256, "media_type": "image/png"}
        image.update(made, seconds=0.5, warnings=self.warnings.get(image["prompt"], []))

    def finished(self, job_id: str) -> list[dict[str, Any]]:
        """The images of a job that have succeeded or failed."""
        images = self.jobs[job_id]["images"]
        return [image for image in images if image["state"] in ("succeeded", "failed")]

    def _bytes(self, image: dict[str, Any]) -> bytes:
        index = image["index"]
        return self.pictures[index] if index < len(self.pictures) else picture(image["seed"])

    def _counted(self, job: dict[str, Any]) -> dict[str, Any]:
        """The job with its counts, state and progress computed from its images."""
        states = [image["state"] for image in job["images"]]
        names = ("queued", "running", "succeeded", "failed", "cancelled")
        job["counts"] = {"total": len(states), **{name: states.count(name) for name in names}}
        unfinished = job["counts"]["queued"] + job["counts"]["running"]
        worst = next((n for n in ("failed", "cancelled") if job["counts"][n]), "succeeded")
        is_fresh = unfinished == len(states)
        job["state"] = worst if not unfinished else "queued" if is_fresh else "running"
        job["progress"] = sum(image["step"] for image in job["images"]) / (4 * len(states))
        return job
