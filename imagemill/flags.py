"""The flags of `imagemill generate`, and what its prompts are.

Imports nothing heavy: `--help` passes through here. Ranges are the server's to judge.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagemill import complete
from imagemill.terminal import Pictures

if TYPE_CHECKING:
    from imagemill.prompts import Prompt

Prompts = Annotated[list[str] | None, typer.Argument(help="What to draw, each in quotes.")]
File = Annotated[
    str | None,
    typer.Option("--file", "-f", help=".txt (one a line), .json, .jsonl, .csv, or - for stdin."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the images.")]
Model = Annotated[
    str | None,
    typer.Option(help="Default: the catalog's first.", autocompletion=complete.models),
]
Width = Annotated[int | None, typer.Option(help="Pixels.")]
Height = Annotated[int | None, typer.Option(help="Pixels.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
GuidanceScale = Annotated[float | None, typer.Option(help="How strictly to follow the prompt.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What the pictures should not show.")]
Seed = Annotated[int | None, typer.Option(help="Drawn at random when left out.")]
Copies = Annotated[int | None, typer.Option("--n", "-n", help="Images of each prompt.")]
Priority = Annotated[int | None, typer.Option(help="0 to 9; 9 goes first.")]
Format = Annotated[str | None, typer.Option(help="png, jpeg or webp.")]
IdempotencyKey = Annotated[
    str | None, typer.Option(help="The same key again is the same job, not another.")
]
Watch = Annotated[
    bool, typer.Option("--watch", "-w", help="Show the pictures in the terminal as they come.")
]
Picture = Annotated[
    Pictures | None,
    typer.Option(help="--watch, and how it draws; default: the best that the terminal can."),
]
Title = Annotated[
    str | None,
    typer.Option(help="The job's name; default: that of its file, or the first prompt."),
]
Resume = Annotated[
    str | None,
    typer.Option(metavar="JOB", help="Go on with an earlier job.", autocompletion=complete.jobs),
]


TITLE_LENGTH = 80
"""Characters of a title that nobody gave; as on the page."""


def all_prompts(texts: Sequence[str], file: str | None, resume: str | None) -> "list[Prompt]":
    """What was typed, then what is in the file. Raises InvalidInput for none, or one too many."""
    from imagemill.errors import InvalidInput
    from imagemill.prompts import Prompt, read_prompts

    prompts = [Prompt(text) for text in texts]
    if file is not None:
        prompts += read_prompts(file)
    if resume is None and not prompts:
        raise InvalidInput("no prompts: give some in quotes, or a file of them with --file")
    if resume is not None and prompts:
        raise InvalidInput("--resume takes no prompts: the job has its own")
    return prompts


def job_fields(
    settings: Mapping[str, Any], title: str | None, file: str | None, prompts: "Sequence[Prompt]"
) -> dict[str, Any]:
    """What is given of the settings, and the job's title where the page and `status` look."""
    given = {name: value for name, value in settings.items() if value is not None}
    if title is None and prompts:
        named = Path(file).name if file not in (None, "-") else prompts[0].text
        # a file's name may hold bytes that are no text
        title = named.encode(errors="replace").decode()[:TITLE_LENGTH]
    return {**given, "metadata": {"title": title}} if title else given


def check_resume(resume: str | None, own: Mapping[str, Any]) -> None:
    """Raises InvalidInput for what was given of that which a resumed job has of its own."""
    from imagemill.errors import InvalidInput

    given = ["--" + name.replace("_", "-") for name, value in own.items() if value is not None]
    if resume is not None and given:
        raise InvalidInput(f"--resume takes no {', '.join(given)}: the job has its own")
