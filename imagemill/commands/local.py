"""Commands for the `up` on this machine's data folder: `down` stops it, `logs` shows its logs."""

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from imagemill.commands.help import Command
from imagemill.commands.options import DATA, Data

TAIL_BYTES = 256 * 2**10
"""The last part of a log that's searched for its last lines."""

FOLLOW_PAUSE = 0.5
STOP_PAUSE = 0.1


class Part(StrEnum):
    """A part of `up` with a log of its own; `up` writes one only if a `generate` started it."""

    SERVICE = "service"
    WORKERS = "workers"
    QUEUE = "queue"
    UP = "up"


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (down, logs):
        app.command(cls=Command)(command)


def down(
    data: Data = DATA,
    now: Annotated[
        bool, typer.Option("--now", help="Don't let running images finish; they run again later.")
    ] = False,
) -> None:
    """Stop the server on the data folder and wait until it has ended.

    Running images finish first. Queued ones stay queued for the next `up`.
    """
    import os
    import signal
    from contextlib import suppress

    from imagemill.client.errors import InvalidInput
    from imagemill.local.up_lock import is_held, running
    from imagemill.terminal.interrupts import Interrupts

    record = running(data)
    if record is None:
        typer.echo(f"no server is running on {data}")
        return
    if record.private:
        raise InvalidInput(
            f"the server on {data} belongs to a running `generate` and ends with it; press Ctrl-C "
            "there to stop both"
        )
    with Interrupts() as interrupts, suppress(ProcessLookupError):
        typer.echo(f"stopping imagemill on {data} (process {record.pid})")
        os.kill(record.pid, signal.SIGTERM)
        while is_held(data / "up.lock"):
            if interrupts.asked():
                raise typer.Exit(130)
            interrupts.rest(STOP_PAUSE)
            if now:  # `up` takes a second signal for impatience, but merges two at the same time
                os.kill(record.pid, signal.SIGTERM)
    typer.echo("stopped")


def logs(
    part: Annotated[
        Part | None, typer.Argument(metavar="[PART]", help="Whose log. Default: all of them.")
    ] = None,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=1, help="How many of the last lines to show.")
    ] = 20,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new lines until Ctrl-C.")
    ] = False,
    data: Data = DATA,
) -> None:
    """Show the logs of the server on the data folder."""
    from imagemill.client.errors import InvalidInput
    from imagemill.terminal.interrupts import Interrupts

    paths = [data / f"{name}.log" for name in ([part] if part else Part)]
    logs = [_Log(path) for path in paths if path.exists() or (part and follow)]
    if not logs:
        raise InvalidInput(f"no {part or ''} log in {data}".replace("  ", " "))
    shown = None
    for log in logs:
        shown = _show(log, log.last(lines), shown, len(logs) > 1)
    with Interrupts() as interrupts:
        while follow and not interrupts.asked():
            interrupts.rest(FOLLOW_PAUSE)
            for log in logs:
                shown = _show(log, log.new(), shown, len(logs) > 1)


class _Log:
    """A log file and how much of it has been read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = 0
        self._rest = b""

    def last(self, count: int) -> list[str]:
        """The last lines. Later calls of `new` go on from here."""
        try:
            self._place = max(0, self.path.stat().st_size - TAIL_BYTES)
        except FileNotFoundError:
            return []
        is_whole = self._place == 0
        found = list(self.new())
        return (found if is_whole else found[1:])[-count:]

    def new(self) -> Iterator[str]:
        """The lines that were completed since the last call."""
        try:
            if self.path.stat().st_size < self._place:  # it was rotated
                self._place, self._rest = 0, b""
            with self.path.open("rb") as file:
                file.seek(self._place)
                data = file.read(TAIL_BYTES)
        except FileNotFoundError:
            return
        self._place += len(data)
        *complete, self._rest = (self._rest + data).split(b"\n")
        for line in complete:
            yield line.decode(errors="replace")


def _show(
    log: _Log, lines: Iterator[str] | list[str], before: Path | None, named: bool
) -> Path | None:
    """Print lines, below the log's name unless its own came before; returns the last log."""
    from imagemill.terminal.show import printable

    last = before
    for line in lines:
        if named and last != log.path:
            typer.echo(f"{'' if last is None else chr(10)}==> {log.path} <==")
        last = log.path
        typer.echo(printable(line.expandtabs()))
    return last
