"""What Tab offers: jobs and models of the server that a command would talk to.

A shell that waits is worse than one that offers nothing, so a server has half a second, and one
that is away or wants a key that is not set offers nothing. Nothing may be printed here.
"""

from typing import Any

import typer

from imagemill.commands.options import DATA

PATIENCE = 0.5
JOBS = 50


def jobs(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """The latest jobs' ids, each with its state and model."""
    listed = _asked(ctx, "/v1/jobs", limit=JOBS)
    offered = [(str(one["id"]), f"{one['state']}, {one['model']}") for one in listed]
    return [one for one in offered if one[0].startswith(incomplete)]


def models(ctx: typer.Context, incomplete: str) -> list[str]:
    """The names of the models; without a server, those of the catalog."""
    names = [str(one["id"]) for one in _asked(ctx, "/v1/models")] or _in_catalog(ctx)
    return [name for name in names if name.startswith(incomplete)]


def _asked(ctx: typer.Context, path: str, **params: Any) -> list[dict[str, Any]]:
    import httpx

    from imagemill.client.clients import _http_settings
    from imagemill.local.find_server import given_server
    from jobs.errors import ImagemillError

    given = ctx.params
    try:
        settings = _http_settings(
            given_server(given.get("server"), given.get("data") or DATA), None
        )
        with httpx.Client(**{**settings, "timeout": PATIENCE}) as http:
            answer = http.get(path, params=params).raise_for_status().json()
    except (ImagemillError, httpx.HTTPError, httpx.InvalidURL, ValueError):
        return []
    found: list[dict[str, Any]] = answer["data"]
    return found


def _in_catalog(ctx: typer.Context) -> list[str]:
    from imagemill.commands.options import catalog_path
    from jobs.catalog import load_catalog
    from jobs.errors import ImagemillError

    try:
        return [model.name for model in load_catalog(catalog_path(ctx.params.get("models")))]
    except ImagemillError:
        return []
