"""Shell completion of jobs and models, from the server that the command would talk to.

A slow completion is worse than none, so the server gets half a second. If it's unreachable or
requires a key that isn't set, there are no suggestions. Nothing may be printed here.
"""

from typing import Any

import typer

from imagemill.commands.options import DATA

PATIENCE = 0.5
JOBS = 50


def jobs(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """The latest jobs' ids, each with its state and model."""
    latest = _fetch(ctx, "/v1/jobs", limit=JOBS)
    suggestions = [(str(job["id"]), f"{job['state']}, {job['model']}") for job in latest]
    return [(job_id, text) for job_id, text in suggestions if job_id.startswith(incomplete)]


def models(ctx: typer.Context, incomplete: str) -> list[str]:
    """The server's model names; without a server, those in the catalog."""
    names = [str(model["id"]) for model in _fetch(ctx, "/v1/models")] or _in_catalog(ctx)
    return [name for name in names if name.startswith(incomplete)]


def _fetch(ctx: typer.Context, path: str, **params: Any) -> list[dict[str, Any]]:
    import httpx

    from imagemill.client.clients import _http_settings
    from imagemill.local.find_server import resolve_server
    from jobs.errors import ImagemillError

    flags = ctx.params
    try:
        settings = _http_settings(
            resolve_server(flags.get("server"), flags.get("data") or DATA), None
        )
        with httpx.Client(**{**settings, "timeout": PATIENCE}) as http:
            answer = http.get(path, params=params).raise_for_status().json()
    except (ImagemillError, httpx.HTTPError, httpx.InvalidURL, ValueError):
        return []
    entries: list[dict[str, Any]] = answer["data"]
    return entries


def _in_catalog(ctx: typer.Context) -> list[str]:
    from imagemill.commands.options import catalog_path
    from jobs.catalog import load_catalog
    from jobs.errors import ImagemillError

    try:
        return [model.name for model in load_catalog(catalog_path(ctx.params.get("models")))]
    except ImagemillError:
        return []
