"""`imagemill keys`: manages the API keys of one data folder.

The format and storage of keys are up to `service/keys.py`. A running server notices a change
within a second.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from imagemill.commands.help import Command, CommandGroup
from imagemill.commands.options import DATA, AsJson, Data
from imagemill.terminal.output import print_json

if TYPE_CHECKING:
    from service.keys import KeyRing

keys = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    help="Create, list and revoke the API keys of a data folder.",
    rich_markup_mode="rich",
)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.add_typer(keys, name="keys")


@keys.command(cls=Command)
def add(
    tenant: Annotated[
        str, typer.Argument(help="Whose jobs the key can see. A tenant may have several keys.")
    ],
    weight: Annotated[
        float | None, typer.Option(help="Share relative to other tenants. Default: 1.")
    ] = None,
    max_unfinished: Annotated[
        int | None, typer.Option(help="Maximum number of images queued or running.")
    ] = None,
    max_priority: Annotated[
        int | None, typer.Option(help="Highest priority allowed, 0 to 9.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Request rate limit, such as 600/minute.")
    ] = None,
    data: Data = DATA,
    as_json: AsJson = False,
) -> None:
    """Create a key and print it. It can't be shown again, because only its hash is stored."""
    options = {
        "weight": weight,
        "max_unfinished": max_unfinished,
        "max_priority": max_priority,
        "rate": rate,
    }
    ring = _ring(data)
    is_first = not ring
    secret, key = ring.add(
        tenant, **{name: value for name, value in options.items() if value is not None}
    )
    if as_json:
        print_json({"key": secret, **key.model_dump(exclude={"sha256"})})
    else:
        typer.echo(secret)
    _note(f"created {key.id} for tenant {key.tenant}; the key won't be shown again")
    _note("to use it, set IMAGEMILL_API_KEY or send `Authorization: Bearer KEY`")
    if is_first:
        _note(f"this is the first key: from now on, the server on {data} requires one")


@keys.command("list", cls=Command)
def list_keys(data: Data = DATA, as_json: AsJson = False) -> None:
    """List all keys, without their secrets."""
    from imagemill.terminal import show

    entries = [key.model_dump(exclude={"sha256"}) for key in _ring(data).all()]
    if as_json:
        print_json(entries)
    elif entries:
        Console().print(show.keys_table(entries))
    else:
        Console().print(f"no keys in {escape(str(data))}; none is required", soft_wrap=True)


@keys.command(cls=Command)
def revoke(
    ids: Annotated[
        list[str], typer.Argument(metavar="ID...", help="Key ids, as printed by `keys list`.")
    ],
    data: Data = DATA,
) -> None:
    """Revoke keys. Requests with them are refused immediately."""
    ring = _ring(data)
    for key_id in ids:
        ring.revoke(key_id)
        _note(f"revoked {key_id}")
    if not ring:
        _note("that was the last key: a server that only this machine can reach is open again")


def _ring(data: Path) -> "KeyRing":
    from service.keys import KeyRing

    return KeyRing(data / "keys.json")


def _note(sentence: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(escape(sentence))
