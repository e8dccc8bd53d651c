"""`imagemill keys`: who may use a server that others can reach; the keys of one data folder.

What a key is and where it is kept is `service/keys.py`'s business, all of it. A running server
notices a change within a second.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from imagemill.commands.options import DATA, AsJson, Data

if TYPE_CHECKING:
    from service.keys import KeyRing

keys = typer.Typer(
    no_args_is_help=True,
    help="Make, list and revoke the API keys of a data folder.",
    rich_markup_mode="rich",
)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.add_typer(keys, name="keys")


@keys.command()
def add(
    tenant: Annotated[str, typer.Argument(help="Whose jobs the key sees; may have several keys.")],
    weight: Annotated[
        float | None, typer.Option(help="Share beside other tenants; default 1.")
    ] = None,
    max_unfinished: Annotated[
        int | None, typer.Option(help="Images queued or running at once.")
    ] = None,
    max_priority: Annotated[int | None, typer.Option(help="Highest priority, 0 to 9.")] = None,
    rate: Annotated[str | None, typer.Option(help="Requests, such as 600/minute.")] = None,
    data: Data = DATA,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, this once; only its hash is kept."""
    given = {
        "weight": weight,
        "max_unfinished": max_unfinished,
        "max_priority": max_priority,
        "rate": rate,
    }
    ring = _ring(data)
    is_first = not ring
    shown, made = ring.add(tenant, **{name: one for name, one in given.items() if one is not None})
    if as_json:
        typer.echo(json.dumps({"key": shown, **made.model_dump(exclude={"sha256"})}, indent=2))
    else:
        typer.echo(shown)
    _note(f"{made.id} for tenant {made.tenant}; the key is shown only now")
    _note("whoever holds it sets IMAGEMILL_API_KEY, or sends `Authorization: Bearer KEY`")
    if is_first:
        _note(f"it is the first: every caller of a server on {data} needs a key from now on")


@keys.command("list")
def list_keys(data: Data = DATA, as_json: AsJson = False) -> None:
    """Show all keys, but not their secrets."""
    from imagemill.terminal import show

    found = [key.model_dump(exclude={"sha256"}) for key in _ring(data).all()]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    elif found:
        Console().print(show.keys_table(found))
    else:
        Console().print(f"no keys on {escape(str(data))}: callers need none", soft_wrap=True)


@keys.command()
def revoke(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="As `keys list` shows them.")],
    data: Data = DATA,
) -> None:
    """Take keys back; their holders are refused at once."""
    ring = _ring(data)
    for key_id in ids:
        ring.revoke(key_id)
        _note(f"{key_id} is revoked")
    if not ring:
        _note("it was the last: a server that only this machine can reach is open again")


def _ring(data: Path) -> "KeyRing":
    from service.keys import KeyRing

    return KeyRing(data / "keys.json")


def _note(sentence: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(escape(sentence))
