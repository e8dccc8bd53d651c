"""The flags of `imagemill generate`, and what its prompts are.

Imports nothing heavy: `--help` passes through here. Ranges are the server's to judge.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imagemill import complete

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
Resume = Annotated[
    str | None,
    typer.Option(metavar="JOB", help="Go on with an earlier job.", autocompletion=complete.jobs),
]


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
