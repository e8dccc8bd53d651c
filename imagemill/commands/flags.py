"""The flags of `imagemill generate`, and what its prompts are.

Imports nothing heavy: `--help` passes through here. Ranges are the server's to judge.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagemill.commands import complete
from imagemill.terminal.detect import Pictures
from jobs.fields import FIELDS

if TYPE_CHECKING:
    from imagemill.commands.prompts import Prompt

Prompts = Annotated[
    list[str] | None, typer.Argument(help="What to draw, each in quotes; - alone reads stdin.")
]
File = Annotated[
    str | None,
    typer.Option("--file", "-f", help=".txt (one a line), .json, .jsonl, .csv, or - for stdin."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the images.")]
Model = Annotated[
    str | None,
    typer.Option(help="Default: the catalog's first.", autocompletion=complete.models),
]


def _option(name: str, *short: str) -> Any:
    """The flag of a request field, with its help text from the table."""
    return typer.Option(FIELDS[name].flag, *short, help=FIELDS[name].help)


Width = Annotated[int | None, _option("width")]
Height = Annotated[int | None, _option("height")]
Steps = Annotated[int | None, _option("steps")]
GuidanceScale = Annotated[float | None, _option("guidance_scale")]
NegativePrompt = Annotated[str | None, _option("negative_prompt")]
Seed = Annotated[int | None, _option("seed")]
Copies = Annotated[int | None, _option("n", "-n")]
Priority = Annotated[int | None, _option("priority")]
Format = Annotated[str | None, _option("format")]
Fast = Annotated[
    bool, typer.Option("--fast", help="Give up bit-equal pictures from run to run, for speed.")
]
Webhook = Annotated[
    str | None, typer.Option(metavar="URL", help="Told by the server when the job has ended.")
]
Metadata = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Kept with the job; may be given several times."),
]
Detach = Annotated[
    bool,
    typer.Option("--detach", "-d", help="Submit and leave; --resume JOB brings the images later."),
]
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

SETTINGS = tuple(name for name, field in FIELDS.items() if field.kind is not bool)
"""Flags that have the name of their field; `--fast` is `reproducible` turned off."""

OWN = (*SETTINGS, "fast", "webhook", "metadata", "model", "title", "idempotency_key")
"""Flags of that which a resumed job has of its own."""


def all_prompts(texts: Sequence[str], file: str | None, resume: str | None) -> "list[Prompt]":
    """What was typed, then what is in the file. Raises InvalidInput for none, or one too many."""
    from imagemill.client.errors import InvalidInput
    from imagemill.commands.prompts import Prompt, read_prompts

    if resume is not None and (texts or file is not None):
        raise InvalidInput("--resume takes no prompts: the job has its own")
    if list(texts) == ["-"] and file is None:
        texts, file = [], "-"
    prompts = [Prompt(text) for text in texts]
    if file is not None:
        prompts += read_prompts(file)
    if resume is None and not prompts:
        raise InvalidInput("no prompts: give some in quotes, or a file of them with --file")
    return prompts


def job_fields(given: Mapping[str, Any], prompts: "Sequence[Prompt]") -> dict[str, Any]:
    """The fields of `POST /v1/jobs` that the flags of `generate`, by name, amount to."""
    fields = {name: given[name] for name in SETTINGS if given[name] is not None}
    if given["fast"]:
        fields["reproducible"] = False
    if given["webhook"] is not None:
        fields["webhook"] = {"url": given["webhook"]}
    metadata = _metadata(given["metadata"] or ())
    title = _title(given["title"], given["file"], metadata, prompts)
    if title:
        metadata["title"] = title
    return {**fields, "metadata": metadata} if metadata else fields


def _metadata(pairs: Sequence[str]) -> dict[str, str]:
    from imagemill.client.errors import InvalidInput

    metadata: dict[str, str] = {}
    for pair in pairs:
        key, is_pair, value = pair.partition("=")
        if not key or not is_pair:
            raise InvalidInput(f"--metadata {pair}: must be KEY=VALUE")
        if key in metadata:
            raise InvalidInput(f"--metadata {pair}: `{key}` is there twice")
        metadata[key] = value
    return metadata


def _title(
    given: str | None, file: str | None, metadata: Mapping[str, str], prompts: "Sequence[Prompt]"
) -> str | None:
    """The job's name, where the page and `status` look for it."""
    from imagemill.client.errors import InvalidInput

    if "title" in metadata:
        if given is not None:
            raise InvalidInput("--title and --metadata title=... name the job twice")
        return metadata["title"]
    if given is not None or not prompts:
        return given
    named = Path(file).name if file not in (None, "-") else prompts[0].text
    # a file's name may hold bytes that are no text
    return named.encode(errors="replace").decode()[:TITLE_LENGTH]


def check(given: Mapping[str, Any]) -> None:
    """Raises InvalidInput for flags of `generate`, by name, that make no sense together."""
    from imagemill.client.errors import InvalidInput

    if given["resume"] is not None:
        own = ["--" + name.replace("_", "-") for name in OWN if _is_given(given[name])]
        if own:
            raise InvalidInput(f"--resume takes no {', '.join(own)}: the job has its own")
        if given["detach"]:
            raise InvalidInput("--resume waits for the job; `imagemill retry JOB` does not")
    if given["detach"] and (given["watch"] or given["pictures"] is not None):
        raise InvalidInput("--detach does not wait for pictures to show")


def _is_given(value: Any) -> bool:
    return value is not None and value is not False and value != [] and value != ()
