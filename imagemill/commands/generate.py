"""`imagemill generate`: turns prompts into image files.

Submits one job (or resumes an earlier one), follows it, and reports the results. Ctrl-C cancels
unfinished images and keeps the rest; the command to resume is always printed. Drawing is left to
`imagemill.terminal`.
"""

import shlex
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from imagemill.client import protocol
from imagemill.client.clients import Client
from imagemill.client.errors import ApiError, InvalidInput
from imagemill.commands.follow import CANCEL_PATIENCE, Hopeless, Saved, follow, wait_for_defaults
from imagemill.commands.options import DATA, catalog_path
from imagemill.commands.prompts import Prompt
from imagemill.local.find_server import resolve_server, server_for
from imagemill.terminal import show
from imagemill.terminal.detect import Pictures, screen
from imagemill.terminal.interrupts import Interrupted, Interrupts
from imagemill.terminal.output import PatientConsole, print_json
from imagemill.terminal.progress import Bar, Lines
from imagemill.terminal.sheet import LARGEST, contact_sheet, sheet_place
from imagemill.terminal.watch import PreviewBar
from imagemill.terminal.watch_graphics import GraphicsPreviewBar
from jobs.errors import ImagemillError
from jobs.job import State

INTERRUPTED = 130
"""The exit code after Ctrl-C, as in shells: 128 + SIGINT."""

NOTED_IMAGES = 5
"""A warning names this many images."""

ROWS_SHOWN = 20
"""Larger jobs list only their failed images."""


FLAGS = {"reproducible": "fast"}
"""Fields whose flag has a different name."""


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """The options of `generate`; `fields` are the job's own fields and the prompts' defaults.

    `news` is shown before the prompts are sent.
    """

    prompts: Sequence[Prompt]
    fields: Mapping[str, Any]
    out: Path
    data: Path
    models: Path | None = None
    server: str | None = None
    model: str | None = None
    resume: str | None = None
    key: str | None = None
    as_json: bool = False
    pictures: Pictures | None = None
    news: str = ""


class Generation:
    """One run of the command; `run` returns the exit code."""

    def __init__(self, options: GenerateOptions, stdout: PatientConsole, stderr: Console) -> None:
        self._options = options
        self._stdout, self._stderr = stdout, stderr
        stdout.on_cut = self._say_cut
        self._summed_up = ""
        self._console = stderr if options.as_json else stdout
        self._view = _view(self._console, options.pictures)
        self._job: dict[str, Any] | None = None
        self._noted: list[str] = []
        self._started, self._began = time.monotonic(), time.time()

    def run(self) -> int:
        """Submit, follow, download and report; returns the exit code."""
        options = self._options
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"--out {options.out}: {error.strerror}") from error
        try:
            return self._run()
        finally:
            if self._stdout.is_cut:
                self._report_cut()

    def _run(self) -> int:
        options = self._options
        models = catalog_path(options.models)
        with Interrupts() as interrupts:
            try:
                where = options.server, options.data, models
                view = self._view
                with server_for(*where, view.say, view.note, interrupts) as (client, is_private):
                    return self._with_server(client, is_private, interrupts)
            except (Interrupted, KeyboardInterrupt):
                self._report_stopped()
                return INTERRUPTED
            except ImagemillError:
                self._print_resume()
                raise

    def detach(self) -> int:
        """Submit the job to a running server, print how to get its images, and return."""
        options = self._options
        with Client(resolve_server(options.server, options.data)) as client:
            job = self._begin(client)
        command = self._resume_command(job["id"])
        if options.as_json:
            names = ("model", "state", "counts")
            document = {"job": job["id"], **{name: job[name] for name in names}, "resume": command}
            print_json(document)
        else:
            self._say(f"to download its images: {command}")
        return 0

    def _with_server(self, client: Client, is_private: bool, interrupts: Interrupts) -> int:
        saved = Saved(self._options.out)
        if self._options.resume is None:
            self._wait_for_defaults(client, is_private, interrupts)
        self._job = job = self._begin(client)
        if isinstance(self._view, PreviewBar):
            self._view.show_job(client, job["id"])
        log = self._options.data / "workers.log"
        advice = "start one with `imagemill worker`" if not is_private else f"see {log}"
        try:
            with self._view as view, suppress(Interrupted):
                job = follow(
                    client,
                    job,
                    saved,
                    view,
                    interrupts=interrupts,
                    give_up=is_private,
                    since=self._began,
                    advice=advice,
                    shows_running=isinstance(view, Bar),
                )
        except Hopeless:
            self._cancel(client, job, saved)
            raise
        if not State(job["state"]).finished:
            self._say("cancelling unfinished images (press Ctrl-C again to exit immediately)")
            job = self._cancel(client, job, saved)
        self._job = job
        self._report(job, saved)
        if interrupts.asked():
            self._report_stopped()
            return INTERRUPTED
        self._print_resume()
        return 0 if job["state"] == State.SUCCEEDED else 1

    def _begin(self, client: Client) -> dict[str, Any]:
        """The job to follow: a new one, or an earlier one with its failed images queued again."""
        options = self._options
        if options.resume is not None:
            job = client.job(options.resume)
            if job.counts.failed or job.counts.cancelled:
                job.retry()
            self._say(f"job {job.id}: {job.counts.succeeded} of {job.counts.total} images are done")
            return job.raw
        key = options.key or str(uuid.uuid4())
        bodies = [prompt.body() for prompt in options.prompts]
        if options.news:
            self._say(options.news)
        try:
            model = options.model or self._only_model(client)
            job = client.submit(model, bodies, idempotency_key=key, **options.fields)
        except ApiError as error:
            raise _as_invalid_input(error, options.prompts) from error
        images = job.counts.total
        self._say(f"job {job.id}: {images} image{'' if images == 1 else 's'} of {model}")
        for warning in job.raw.get("warnings", ()):
            self._say(f"note: {warning}")
            self._noted.append(warning)
        return job.raw

    def _wait_for_defaults(self, client: Client, is_private: bool, interrupts: Interrupts) -> None:
        """Wait until the server knows the defaults that the job needs."""
        model = self._options.model or self._only_model(client)
        wait_for_defaults(
            client,
            model,
            self._options.fields,
            say=self._say,
            interrupts=interrupts,
            give_up=is_private,
            since=self._began,
        )

    def _only_model(self, client: Client) -> str:
        """The first model in the catalog, used when none was named."""
        models = [str(model["id"]) for model in client.get("/v1/models")["data"]]
        if not models:
            raise InvalidInput("the server has no models")
        return models[0]

    def _cancel(self, client: Client, job: dict[str, Any], saved: Saved) -> dict[str, Any]:
        """Cancel the job and download what finished before that took effect."""
        with Client(client.server, patience=CANCEL_PATIENCE) as patient:
            try:
                job = patient.say(protocol.act(job["id"], "cancel", CANCEL_PATIENCE))
                saved.save(patient, job)
            except ImagemillError as error:
                self._say(f"couldn't cancel: {error}")
        return job

    def _report(self, job: dict[str, Any], saved: Saved) -> None:
        rows = [self._row(image, saved) for image in job["images"]]
        sheet = sheet_place(self._options.out) if saved.paths else None
        if sheet is not None:
            images = [(r["index"], r["prompt"], saved.paths[r["index"]]) for r in rows if r["file"]]
            contact_sheet(images, sheet)
        seconds = time.monotonic() - self._started
        self._note_warnings(job)
        if self._options.as_json:
            print_json(self._document(job, rows, sheet, seconds))
            return
        if len(rows) > ROWS_SHOWN:
            rows = [row for row in rows if row["state"] == State.FAILED]
        if rows:
            self._console.print(show.results_table(rows[:ROWS_SHOWN]))
        if len(rows) > ROWS_SHOWN:
            self._say(f"… and {len(rows) - ROWS_SHOWN} more failed images")
        self._summed_up = self._summary(job, saved, sheet, seconds)
        self._say(self._summed_up)

    def _note_warnings(self, job: dict[str, Any]) -> None:
        """Print the images' warnings, except those that were already printed at the start."""
        indexes: dict[str, list[int]] = {}
        for image in job["images"]:
            for warning in image.get("warnings", ()):
                indexes.setdefault(warning, []).append(image["index"])
        for warning, images in indexes.items():
            if not any(noted.startswith(warning) for noted in self._noted):
                first = ", ".join(map(str, images[:NOTED_IMAGES]))
                more = len(images) - NOTED_IMAGES
                self._say(
                    f"note: {warning}: image {first}" + (f" and {more} more" if more > 0 else "")
                )

    def _summary(
        self, job: dict[str, Any], saved: Saved, sheet: Path | None, seconds: float
    ) -> str:
        counts = job["counts"]
        parts = [f"{counts['succeeded']} of {counts['total']} images in {self._options.out}"]
        if len(saved.paths) > saved.downloaded:
            parts.append(f"{len(saved.paths) - saved.downloaded} already downloaded")
        for state in ("failed", "cancelled"):
            if counts[state]:
                parts.append(f"{counts[state]} {state}")
        parts.append(show.duration(seconds))
        if sheet is not None:
            more = f" (the first {LARGEST})" if len(saved.paths) > LARGEST else ""
            parts.append(f"overview in {sheet}{more}")
        return ", ".join(parts)

    def _row(self, image: dict[str, Any], saved: Saved) -> dict[str, Any]:
        path = saved.paths.get(image["index"])
        names = ("index", "prompt", "seed", "state", "sha256", "error")
        return {
            **{name: image[name] for name in names},
            "warnings": image.get("warnings", []),
            "file": path.name if path else None,
        }

    def _document(
        self,
        job: dict[str, Any],
        rows: list[dict[str, Any]],
        sheet: Path | None,
        seconds: float,
    ) -> dict[str, Any]:
        return {
            "job": job["id"],
            "model": job["model"],
            "state": job["state"],
            "counts": job["counts"],
            "seconds": round(seconds, 3),
            "out": str(self._options.out),
            "sheet": str(sheet) if sheet else None,
            "images": rows,
            "resume": None if job["state"] == State.SUCCEEDED else self._resume_command(job["id"]),
        }

    def _resume_command(self, job_id: str) -> str:
        options = self._options
        words = ["imagemill", "generate", "--resume", job_id, "--out", str(options.out)]
        if options.server:
            words += ["--server", options.server]
        else:
            words += ["--data", str(options.data)] if options.data != DATA else []
            if options.models is not None:
                words += ["--models", str(options.models)]
        return shlex.join(words)

    def _print_resume(self) -> None:
        if self._job is not None and self._job["state"] != State.SUCCEEDED:
            self._say(f"to resume: {self._resume_command(self._job['id'])}")

    def _report_stopped(self) -> None:
        self._say("stopped" if self._job else "stopped before anything was submitted")
        self._print_resume()

    def _say_cut(self) -> None:
        """The reader of standard output is gone, such as `head`; the images are what matters."""
        out = self._options.out
        self._print_error(f"the output's reader is gone; images are still saved in {out}")
        if self._job is not None:
            command = self._resume_command(self._job["id"])
            self._print_error(f"Ctrl-C stops; to resume: {command}")

    def _report_cut(self) -> None:
        if self._summed_up:
            self._print_error(self._summed_up)
        if self._job is not None and self._job["state"] != State.SUCCEEDED:
            self._print_error(f"to resume: {self._resume_command(self._job['id'])}")

    def _print_error(self, message: str) -> None:
        self._stderr.print(escape(show.printable(message)), highlight=False, soft_wrap=True)

    def _say(self, message: str) -> None:
        self._view.say(message)


def _view(console: Console, pictures: Pictures | None) -> Bar | Lines:
    """Where progress is shown; with images only in a terminal and only if asked for."""
    if not console.is_interactive:
        return Lines(console)
    target = screen(console, pictures) if pictures else None
    if target is None:
        return Bar(console)
    return (
        PreviewBar(console)
        if target.kind is Pictures.BLOCKS
        else GraphicsPreviewBar(console, target)
    )


def _as_invalid_input(error: ApiError, prompts: Sequence[Prompt]) -> ImagemillError:
    """A refused request as InvalidInput, with each problem located in the user's own input."""
    if error.status not in (400, 404, 413, 422):
        return error
    if not error.errors:
        return InvalidInput(error.detail or error.title)
    return InvalidInput(*(_sentence(p.pointer, p.detail, prompts) for p in error.errors))


def _sentence(pointer: str, detail: str, prompts: Sequence[Prompt]) -> str:
    parts = pointer.split("/")[1:]
    if len(parts) >= 2 and parts[0] == "prompts" and parts[1].isdecimal():
        prompt = prompts[int(parts[1])]
        place = prompt.source or f"prompt {int(parts[1]) + 1} ({prompt.text[:40]!r})"
    elif parts in (["prompts"], ["model"], []):
        return detail
    elif parts[0] == "metadata":
        return f"--title and --metadata: {detail}"
    else:
        place = "--" + FLAGS.get(parts[0], parts[0].replace("_", "-"))
    name = parts[-1] if not parts[-1].isdecimal() else ""
    sentence = detail if not name or name in detail else f"{name} {detail}"
    return f"{place}: {sentence}"
