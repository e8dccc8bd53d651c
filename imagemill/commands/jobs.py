"""Commands for jobs: download, cancel, retry, delete.

They never start a server; without one they fail with a sentence.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from imagemill.commands import complete, flags
from imagemill.commands.help import Command
from imagemill.commands.options import DATA, AsJson, Data, Server
from imagemill.terminal.output import print_json

if TYPE_CHECKING:
    from imagemill.client.jobs import Job
    from jobs.job import Counts

Jobs = Annotated[
    list[str],
    typer.Argument(
        metavar="JOB...", help="Job ids, as printed by `status`.", autocompletion=complete.jobs
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (download, cancel, retry, delete):
        app.command(cls=Command)(command)


def download(
    job: Annotated[
        str, typer.Argument(metavar="JOB", help="A job id.", autocompletion=complete.jobs)
    ],
    out: flags.Out = Path("out"),
    server: Server = None,
    data: Data = DATA,
    as_json: AsJson = False,
) -> None:
    """Download a job's finished images that aren't in the folder yet. Doesn't wait for others."""
    from imagemill.client.clients import Client
    from imagemill.commands.follow import Saved
    from imagemill.local.find_server import resolve_server

    with Client(resolve_server(server, data)) as client:
        found = client.job(job)
        out.mkdir(parents=True, exist_ok=True)
        saved = Saved(out)
        saved.save(client, found.raw)
    counts = found.counts
    if as_json:
        files = [{"index": i, "file": path.name} for i, path in sorted(saved.paths.items())]
        print_json({**_summary(found), "out": str(out), "images": files})
        return
    parts = [f"{len(saved.paths)} of {counts.total} images in {out}"]
    if len(saved.paths) > saved.downloaded:
        parts.append(f"{len(saved.paths) - saved.downloaded} already downloaded")
    parts += [f"{n} {what}" for n, what in _missing(counts) if n]
    Console(highlight=False, soft_wrap=True).print(escape(", ".join(parts)))


def _missing(counts: "Counts") -> list[tuple[int, str]]:
    waiting = counts.queued + counts.running
    return [
        (waiting, "not finished yet"),
        (counts.failed, "failed"),
        (counts.cancelled, "cancelled"),
    ]


def cancel(jobs: Jobs, server: Server = None, data: Data = DATA, as_json: AsJson = False) -> None:
    """Cancel the unfinished images of jobs. Finished images are kept."""

    def cancel_job(job: "Job") -> tuple[dict[str, Any], str]:
        counts = job.cancel().counts
        finished = f"{counts.succeeded} of {counts.total} images finished"
        return _summary(job), f"{job.state}; {finished}, {counts.cancelled} cancelled"

    _for_each(jobs, cancel_job, server, data, as_json)


def retry(jobs: Jobs, server: Server = None, data: Data = DATA, as_json: AsJson = False) -> None:
    """Queue the failed and cancelled images of jobs again. Finished images are kept."""

    def retry_job(job: "Job") -> tuple[dict[str, Any], str]:
        counts = job.retry().counts
        return _summary(job), f"{job.state}; {counts.queued} of {counts.total} images queued"

    _for_each(jobs, retry_job, server, data, as_json)


def delete(jobs: Jobs, server: Server = None, data: Data = DATA, as_json: AsJson = False) -> None:
    """Delete jobs and their images from the server, stopping those that are running."""

    def delete_job(job: "Job") -> tuple[dict[str, Any], str]:
        job.delete()
        return {"id": job.id, "deleted": True}, "deleted"

    _for_each(jobs, delete_job, server, data, as_json)


def _summary(job: "Job") -> dict[str, Any]:
    return {"id": job.id, "state": job.state, "counts": job.raw["counts"]}


def _for_each(
    jobs: list[str],
    change: "Callable[[Job], tuple[dict[str, Any], str]]",
    server: str | None,
    data: Path,
    as_json: bool,
) -> None:
    """Change the jobs one by one, stopping at the first error."""
    from imagemill.client.clients import Client
    from imagemill.local.find_server import resolve_server

    console, documents = Console(highlight=False, soft_wrap=True), []
    with Client(resolve_server(server, data)) as client:
        for name in jobs:
            job = client.job(name)
            document, outcome = change(job)
            documents.append(document)
            if not as_json:
                console.print(f"{job.id}: {outcome}")
    if as_json:
        print_json(documents)
