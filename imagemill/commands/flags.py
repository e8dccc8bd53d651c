"""The flags of `imagemill generate`, and how they become prompts and job fields.

Imports nothing heavy, because `--help` runs through here. The server checks ranges.
"""

import re
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
    list[str] | None, typer.Argument(help="Prompts, each in quotes. A single - reads stdin.")
]
File = Annotated[
    str | None,
    typer.Option(
        "--file",
        "-f",
        metavar="FILE",
        help=".txt (one prompt per line), .json, .jsonl, .csv, .tsv, or - for stdin.",
    ),
]
Expand = Annotated[
    bool,
    typer.Option(
        "--expand", help="Make a prompt of every choice in {red|blue} star and of __wildcards__."
    ),
]
Wildcards = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder of the wildcards' .txt files (implies --expand). Default: wildcards.",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the images.")]
Model = Annotated[
    str | None,
    typer.Option(help="Default: the first in the catalog.", autocompletion=complete.models),
]


def _option(name: str, *short: str) -> Any:
    """The flag of a request field, with its help text from FIELDS."""
    return typer.Option(FIELDS[name].flag, *short, help=FIELDS[name].help)


Size = Annotated[
    str | None, typer.Option(metavar="WxH", help="Width and height in pixels, such as 1024x768.")
]
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
    bool, typer.Option("--fast", help="Run faster, without bit-identical results across runs.")
]
Webhook = Annotated[
    str | None, typer.Option(metavar="URL", help="Notified by the server when the job ends.")
]
Metadata = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Stored with the job. Repeatable."),
]
Detach = Annotated[
    bool,
    typer.Option("--detach", "-d", help="Submit and exit. Download later with --resume JOB."),
]
IdempotencyKey = Annotated[
    str | None, typer.Option(help="Reusing a key finds the same job instead of adding one.")
]
Watch = Annotated[
    bool,
    typer.Option("--watch", "-w", help="Show the images in the terminal as they are generated."),
]
Picture = Annotated[
    Pictures | None,
    typer.Option(help="How --watch draws (implies it). Default: the best the terminal supports."),
]
Title = Annotated[
    str | None,
    typer.Option(help="The job's name. Default: the prompt file's name, or the first prompt."),
]
Resume = Annotated[
    str | None,
    typer.Option(metavar="JOB", help="Continue an earlier job.", autocompletion=complete.jobs),
]


WILDCARDS = Path("wildcards")

TITLE_LENGTH = 80
"""Characters of a default title; the page uses the same number."""

SETTINGS = tuple(name for name, field in FIELDS.items() if field.kind is not bool)
"""Flags named after their field. `--fast` isn't: it turns `reproducible` off."""

OWN = (*SETTINGS, "size", "fast", "webhook", "metadata", "model", "title", "idempotency_key")
"""Flags that `--resume` refuses, because the job already has these values."""


def all_prompts(texts: Sequence[str], file: str | None, resume: str | None) -> "list[Prompt]":
    """The prompts on the command line, then those in the file.

    Raises InvalidInput if there are none, or if there are any with `--resume`.
    """
    from imagemill.client.errors import InvalidInput
    from imagemill.commands.prompts import Prompt, read_prompts

    if resume is not None and (texts or file is not None):
        raise InvalidInput("--resume takes no prompts, because the job has its own")
    if list(texts) == ["-"] and file is None:
        texts, file = [], "-"
    prompts = [Prompt(text) for text in texts]
    if file is not None:
        prompts += read_prompts(file)
    if resume is None and not prompts:
        raise InvalidInput("no prompts: pass some in quotes, or a file with --file")
    return prompts


def expanded(
    prompts: "list[Prompt]", is_wanted: bool, folder: Path | None
) -> "tuple[list[Prompt], str]":
    """The prompts with their choices expanded if that's wanted, and a sentence about it."""
    if not prompts or not (is_wanted or folder is not None):
        return prompts, ""
    from imagemill.commands.expand import expand

    every = expand(prompts, folder or WILDCARDS)
    given = f"{len(prompts)} prompt{'' if len(prompts) == 1 else 's'}"
    return every, f"--expand: {given} became {len(every)}"


def job_fields(flags: Mapping[str, Any], prompts: "Sequence[Prompt]") -> dict[str, Any]:
    """The fields of `POST /v1/jobs` for the flags of `generate`, which are given by name."""
    fields = {name: flags[name] for name in SETTINGS if flags[name] is not None}
    if flags["size"] is not None:
        fields["width"], fields["height"] = _sides(flags["size"])
    if flags["fast"]:
        fields["reproducible"] = False
    if flags["webhook"] is not None:
        fields["webhook"] = {"url": flags["webhook"]}
    metadata = _metadata(flags["metadata"] or ())
    title = _title(flags["title"], flags["file"], metadata, prompts)
    if title:
        metadata["title"] = title
    return {**fields, "metadata": metadata} if metadata else fields


def _sides(size: str) -> tuple[int, int]:
    from imagemill.client.errors import InvalidInput

    match = re.fullmatch(r"([0-9]{1,9})\s*[xX×*]\s*([0-9]{1,9})", size.strip())
    if match is None:
        raise InvalidInput(f"--size {size!r}: expected WIDTHxHEIGHT, such as 1024x768")
    return int(match[1]), int(match[2])


def _metadata(pairs: Sequence[str]) -> dict[str, str]:
    from imagemill.client.errors import InvalidInput

    metadata: dict[str, str] = {}
    for pair in pairs:
        key, is_pair, value = pair.partition("=")
        if not key or not is_pair:
            raise InvalidInput(f"invalid --metadata {pair!r}: expected KEY=VALUE")
        if key in metadata:
            raise InvalidInput(f"invalid --metadata {pair!r}: `{key}` is given twice")
        metadata[key] = value
    return metadata


def _title(
    title: str | None, file: str | None, metadata: Mapping[str, str], prompts: "Sequence[Prompt]"
) -> str | None:
    """The job's title. Default: the prompt file's name, or the first prompt."""
    from imagemill.client.errors import InvalidInput

    if "title" in metadata:
        if title is not None:
            raise InvalidInput("use either --title or --metadata title=..., not both")
        return metadata["title"]
    if title is not None or not prompts:
        return title
    default = Path(file).name if file not in (None, "-") else prompts[0].text
    # a file's name may contain bytes that aren't valid UTF-8
    return default.encode(errors="replace").decode()[:TITLE_LENGTH]


def check(flags: Mapping[str, Any]) -> None:
    """Raise InvalidInput for flags of `generate` that contradict each other."""
    from imagemill.client.errors import InvalidInput

    if flags["resume"] is not None:
        own = ["--" + name.replace("_", "-") for name in OWN if _is_set(flags[name])]
        if own:
            raise InvalidInput(f"--resume takes no {', '.join(own)}, because the job has its own")
        if flags["detach"]:
            raise InvalidInput(
                "--detach doesn't work with --resume; use `imagemill retry JOB` to not wait"
            )
    if flags["size"] is not None and (flags["width"], flags["height"]) != (None, None):
        raise InvalidInput("use either --size or --width and --height, not both")
    if flags["detach"] and (flags["watch"] or flags["pictures"] is not None):
        raise InvalidInput(
            "--detach doesn't work with --watch or --pictures, because it doesn't wait for images"
        )


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value != [] and value != ()
