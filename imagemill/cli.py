"""The `imagemill` command: what can be typed, and what errors become.

Each command reads its flags here and leaves the work to a module that is imported only then, so
that `--help` and a typing mistake cost nothing. A user's mistake or a server that is down is one
sentence and an exit code, never a traceback.
"""

import errno
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from imagemill.commands import flags, jobs, keys, pictures, processes, status
from imagemill.commands.options import (
    DATA,
    HOST,
    PORT,
    AsJson,
    Data,
    Host,
    Models,
    Port,
    Server,
    catalog_path,
)
from imagemill.terminal.detect import Pictures
from jobs.errors import ConfigurationError, ImagemillError

BAD_INPUT, ALREADY_RUNNING = 2, 3
UNAUTHORIZED = 401

EXIT_CODES = (
    "Exit codes: 0 done, 1 something failed, 2 bad input, 3 already running, 130 stopped by Ctrl-C."
)


class Commands(TyperGroup):
    """Turns our errors into a sentence on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except ImagemillError as error:
            raise typer.Exit(_complain(error)) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # who read our output has gone, which is no fault
                raise
            reason = error.strerror or str(error)
            said = f"{error.filename}: {reason}" if error.filename else reason
            raise typer.Exit(_complain(ImagemillError(said))) from None


def _complain(error: ImagemillError) -> int:
    from imagemill.client.errors import AlreadyRunning, ApiError, InvalidInput

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    for line in str(error).splitlines() or [type(error).__name__]:
        console.print(f"[red]error:[/red] {escape(line)}")
    if isinstance(error, ApiError) and error.status == UNAUTHORIZED:
        console.print("set IMAGEMILL_API_KEY to one; `imagemill keys add NAME` makes them")
    if isinstance(error, AlreadyRunning):
        return ALREADY_RUNNING
    return BAD_INPUT if isinstance(error, InvalidInput | ConfigurationError) else 1


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog=EXIT_CODES,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"imagemill {version('imagemill')}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    """Batches of prompts in, images out: a queue and a pool of diffusion workers."""


@app.command()
def up(
    host: Host = HOST,
    port: Port = PORT,
    data: Data = DATA,
    models: Models = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Workers of each model; default: the catalog's.")
    ] = None,
    private: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Run everything on this machine: queue server, API, page, workers."""
    from imagemill.local.up import UpOptions, run_up
    from imagemill.terminal import show

    console = Console()
    options = UpOptions(host, port, data, catalog_path(models), workers, private)
    run_up(
        options,
        say=lambda news: console.print(escape(news), highlight=False, soft_wrap=True),
        show_ready=lambda ready: console.print(show.ready_panel(ready)),
    )


@app.command()
def generate(
    ctx: typer.Context,
    prompts: flags.Prompts = None,
    file: flags.File = None,
    out: flags.Out = Path("out"),
    model: flags.Model = None,
    width: flags.Width = None,
    height: flags.Height = None,
    steps: flags.Steps = None,
    guidance_scale: flags.GuidanceScale = None,
    negative_prompt: flags.NegativePrompt = None,
    seed: flags.Seed = None,
    n: flags.Copies = None,
    priority: flags.Priority = None,
    format: flags.Format = None,
    fast: flags.Fast = False,
    server: Server = None,
    data: Data = DATA,
    models: Models = None,
    idempotency_key: flags.IdempotencyKey = None,
    resume: flags.Resume = None,
    detach: flags.Detach = False,
    title: flags.Title = None,
    metadata: flags.Metadata = None,
    webhook: flags.Webhook = None,
    watch: flags.Watch = False,
    pictures: flags.Picture = None,
    as_json: AsJson = False,
) -> None:
    """Make images of prompts; start what is needed for it, unless a server is named."""
    from imagemill.commands.generate import GenerateOptions, Generation

    flags.check(ctx.params)
    wanted = flags.all_prompts(prompts or [], file, resume)
    options = GenerateOptions(
        prompts=wanted,
        fields=flags.job_fields(ctx.params, wanted),
        out=out,
        data=data,
        models=models,
        server=server,
        model=model,
        resume=resume,
        key=idempotency_key,
        as_json=as_json,
        pictures=pictures or (Pictures.AUTO if watch else None),
    )
    generation = Generation(options, Console(), Console(stderr=True))
    raise typer.Exit(generation.leave() if detach else generation.run())


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(help="A catalog's model, a diffusers folder, a weight file or a hub id."),
    ],
    devices: Annotated[
        str | None,
        typer.Option(help="Such as 2x24GB or 1x24GB+1x80GB; default: this machine's."),
    ] = None,
    cpu: Annotated[str, typer.Option(help="Memory for weights that wait.")] = "64GB",
    models: Models = None,
    as_json: AsJson = False,
) -> None:
    """Which placements of a model fit which devices, the catalog lines to paste, and which to use.

    Counts quantized weights as they are held, and refuses what a worker would refuse. Of a hub id
    it fetches the configs alone.
    """
    from imagemill.commands.plan import run_plan

    run_plan(model, devices, cpu, catalog_path(models), as_json, Console())


status.register(app)
jobs.register(app)
processes.register(app)
pictures.register(app)
keys.register(app)


def main() -> None:
    """The entry point of the `imagemill` script."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
