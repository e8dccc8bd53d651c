"""`imagemill plan`: which placements of a model fit which devices, and the catalog lines for them.

Resolves the model and the devices; `pipelines.planner.survey` does the arithmetic.
"""

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from imagemill.client.errors import InvalidInput
from imagemill.terminal.output import print_json
from jobs.catalog import DERIVED, Model, load_catalog
from jobs.errors import ConfigurationError, ModelUnavailable, UnknownModel

if TYPE_CHECKING:
    from pipelines.loading.checkpoint import Checkpoint
    from pipelines.planner.survey import Survey

MOST_DEVICES = 64
_DEVICES = re.compile(r"(?:(\d+)\s?x\s?)?(\d+(?:\.\d+)?\s?[MGT]i?B)", re.IGNORECASE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")


def run_plan(
    name: str, devices: str | None, cpu: str, models: Path, as_json: bool, console: Console
) -> None:
    """Print how the model can be placed. Raises InvalidInput and ConfigurationError."""
    from pipelines.planner.memory import bytes_of
    from pipelines.planner.survey import survey

    sizes = devices_of(devices) if devices else devices_here()
    model = model_of(name, models)
    try:
        result = survey(model, _checkpoint(model), sizes, bytes_of(cpu))
    except ModelUnavailable as error:
        raise ConfigurationError(str(error)) from error
    if as_json:
        print_json(asdict(result))
    else:
        show(result, console)


def devices_of(text: str) -> list[int]:
    """Bytes of each device in "2x24GB", "24GB" or "1x24GB+1x80GB". Raises InvalidInput."""
    from pipelines.planner.memory import bytes_of

    sizes: list[int] = []
    for part in text.split("+"):
        match = _DEVICES.fullmatch(part.strip())
        count = int(match[1] or 1) if match else 0
        if match is None or not 1 <= count <= MOST_DEVICES or not bytes_of(match[2]):
            raise InvalidInput(
                f"invalid --devices {text!r}: expected something like 2x24GB, 80GB or 1x24GB+1x80GB"
            )
        sizes += [bytes_of(match[2])] * count
    return sizes


def devices_here() -> list[int]:
    """Bytes of each accelerator of this machine. Raises InvalidInput if there aren't any."""
    import torch

    if not torch.accelerator.is_available():
        raise InvalidInput("no accelerator found; describe devices with --devices, such as 2x24GB")
    module = torch.get_device_module()
    return [module.mem_get_info(index)[1] for index in range(torch.accelerator.device_count())]


def model_of(name: str, models: Path) -> Model:
    """The model with that name in the catalog, or a diffusers folder, a weight file or a hub id.

    Raises ConfigurationError.
    """
    path = Path(name)
    if (path / "model_index.json").is_file() or path.is_file():
        resolved = path.resolve()
        return Model(
            _plain_name(resolved.stem if path.is_file() else resolved.name),
            str(resolved),
            True,
            unset=DERIVED,
        )
    try:
        return load_catalog(models).get(name)
    except UnknownModel as error:
        if _HUB_ID.fullmatch(name):
            return Model(_plain_name(name.rpartition("/")[2]), name, unset=DERIVED)
        raise ConfigurationError(
            f"{error}; {name!r} isn't a diffusers folder, a weight file or a hub id either"
        ) from error


def _plain_name(text: str) -> str:
    return _NOT_IN_A_NAME.sub("-", text).strip("-._") or "model"


def _checkpoint(model: Model) -> "Checkpoint":
    """The model's folder; for a hub id only its configs, because planning needs no weights."""
    from pipelines.loading.checkpoint import find_checkpoint, has_weights, look_over

    checkpoint = find_checkpoint(model, weights=False)
    if has_weights(checkpoint) and model.local:
        look_over(model, checkpoint)
    return checkpoint


def show(result: "Survey", console: Console) -> None:
    """Print the tables, and the catalog lines for the placements that fit."""
    console.print(f"[bold]{escape(result.model)}[/bold]: {escape(result.image)}", highlight=False)
    console.print()
    console.print(_components(result))
    console.print()
    console.print(_options(result))
    for note in result.notes:
        console.print(f"\n[dim]{escape(note)}[/dim]", highlight=False)
    fitting = [option.catalog for option in result.options if option.catalog]
    console.print("\n[bold]For models.toml:[/bold]")
    for lines in fitting:
        console.print(f"\n{escape(lines)}", highlight=False, soft_wrap=True)
    console.print(f"\n[bold]{escape(result.use)}[/bold]", highlight=False, soft_wrap=True)


def _components(result: "Survey") -> Table:
    from pipelines.planner.memory import in_words

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "component", "as"):
        table.add_column(name, no_wrap=True)
    for name in ("weights", "for an image"):
        table.add_column(name, justify="right", no_wrap=True)
    for component in result.components:
        sizes = in_words(component.weights), in_words(component.activations)
        table.add_row(component.stage, component.name, component.kind, *sizes)
    total = in_words(sum(c.weights for c in result.components))
    most = in_words(max((c.activations for c in result.components), default=0))
    table.add_row("[bold]all[/bold]", "", "", f"[bold]{total}[/bold]", f"at most {most}")
    return table


def _options(result: "Survey") -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    table.add_column("placement", width=len("ring 2 x ulysses 2"))
    table.add_column("fits", no_wrap=True)
    table.add_column("arithmetic", ratio=5)
    table.add_column("speed of a replica", ratio=3)
    for option in result.options:
        fits = "[green]yes[/green]" if option.fits else "[red]no[/red]"
        row = escape(option.name), fits, escape(option.arithmetic), escape(option.speed or "–")
        table.add_row(*row)
    return table
