"""The `imagemill` command line and its error handling.

Each command parses its flags here and imports the module that does the work only when it runs, so
`--help` and typing mistakes stay fast. A user's mistake or an unreachable server ends in one
sentence and an exit code, never a traceback.
"""

import errno
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from imagemill.commands import flags, jobs, keys, local, pictures, processes, setup, status
from imagemill.commands.help import Command, CommandGroup
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
from imagemill.terminal.output import PatientConsole, tolerate_encodings
from jobs.errors import ConfigurationError, ImagemillError

BAD_INPUT, ALREADY_RUNNING = 2, 3
UNAUTHORIZED = 401

EXIT_CODES = (
    "Exit codes: 0 done, 1 something failed, 2 bad input, 3 already running, 130 stopped by Ctrl-C."
)


class Commands(CommandGroup):
    """Prints our errors as a sentence on stderr and turns them into exit codes."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except ImagemillError as error:
            raise typer.Exit(_complain(error)) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output is gone, which isn't an error
                raise
            reason = error.strerror or str(error)
            message = f"{error.filename}: {reason}" if error.filename else reason
            raise typer.Exit(_complain(ImagemillError(message))) from None


def _complain(error: ImagemillError) -> int:
    from imagemill.client.errors import AlreadyRunning, ApiError, InvalidInput

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    for line in str(error).splitlines() or [type(error).__name__]:
        console.print(f"[red]error:[/red] {escape(line)}")
    if isinstance(error, ApiError) and error.status == UNAUTHORIZED:
        console.print(
            "set IMAGEMILL_API_KEY to an API key; create one with `imagemill keys add NAME`"
        )
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


def _version(is_requested: bool) -> None:
    if is_requested:
        from importlib.metadata import version

        typer.echo(f"imagemill {version('imagemill')}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Turn batches of prompts into images with a queue and a pool of diffusion workers."""


@app.command(cls=Command)
def up(
    host: Host = HOST,
    port: Port = PORT,
    data: Data = DATA,
    models: Models = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Workers per model. Default: from the catalog.")
    ] = None,
    private: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Run everything on this machine: queue server, API, web page and workers."""
    from imagemill.local.up import UpOptions, run_up
    from imagemill.terminal import show

    console = Console()
    options = UpOptions(host, port, data, catalog_path(models), workers, private)
    run_up(
        options,
        say=lambda message: console.print(escape(message), highlight=False, soft_wrap=True),
        show_ready=lambda ready: console.print(show.ready_panel(ready)),
    )


@app.command(cls=Command)
def generate(
    ctx: typer.Context,
    prompts: flags.Prompts = None,
    file: flags.File = None,
    expand: flags.Expand = False,
    wildcards: flags.Wildcards = None,
    out: flags.Out = Path("out"),
    model: flags.Model = None,
    size: flags.Size = None,
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
    """Generate images from prompts. Starts a private server if none is running or named."""
    from imagemill.commands.generate import GenerateOptions, Generation

    flags.check(ctx.params)
    given = flags.all_prompts(prompts or [], file, resume)
    all_prompts, news = flags.expanded(given, expand, wildcards)
    options = GenerateOptions(
        prompts=all_prompts,
        fields=flags.job_fields(ctx.params, all_prompts),
        out=out,
        data=data,
        models=models,
        server=server,
        model=model,
        resume=resume,
        key=idempotency_key,
        as_json=as_json,
        pictures=pictures or (Pictures.AUTO if watch else None),
        news=news,
    )
    generation = Generation(options, PatientConsole(), PatientConsole(stderr=True))
    raise typer.Exit(generation.detach() if detach else generation.run())


@app.command(cls=Command)
def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A model of the catalog, a diffusers folder, a weight file or a hub id."
        ),
    ],
    devices: Annotated[
        str | None,
        typer.Option(help="Such as 2x24GB or 1x24GB+1x80GB. Default: this machine's."),
    ] = None,
    cpu: Annotated[str, typer.Option(help="Host memory for offloaded weights.")] = "64GB",
    models: Models = None,
    as_json: AsJson = False,
) -> None:
    """Show which placements of a model fit the devices, which to use, and their catalog lines.

    Counts quantized weights at their size in memory and refuses what a worker would refuse. For a
    hub id, only the configs are downloaded.
    """
    from imagemill.commands.plan import run_plan

    run_plan(model, devices, cpu, catalog_path(models), as_json, Console())


status.register(app)
jobs.register(app)
processes.register(app)
local.register(app)
pictures.register(app)
keys.register(app)
setup.register(app)


def main() -> None:
    """Entry point of the `imagemill` script."""
    tolerate_encodings()
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
