"""Renders tables, durations, speeds and the panel of `up` for a rich console."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from imagemill.terminal.fitting import Block, Fitting
from jobs.job import State
from jobs.reports import Measured, ModelCard

if TYPE_CHECKING:
    from imagemill.client.models import Model, Worker
    from imagemill.local.up import Ready

COLOURS = {
    "queued": "yellow",
    "running": "cyan",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "magenta",
    "ready": "green",
    "starting": "yellow",
    "draining": "magenta",
}

TITLE_WIDTH, ERROR_WIDTH = 4, 20
"""Characters that a job's title and a worker's error need in a table; more if there's room."""


def coloured(state: str) -> Text:
    """A state's name, in its colour."""
    return Text(state, style=COLOURS.get(state, ""))


def duration(seconds: float | None) -> str:
    """Such as `8 s`, `1:05 min` or `2:03:00 h`; a dash if unknown."""
    if seconds is None:
        return "–"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def speed(per_second: float | None) -> str:
    """Such as `1.3 images/s`, or seconds per image below one image in ten seconds."""
    if not per_second:
        return "–"
    if per_second >= 0.1:
        return f"{per_second:.1f} images/s"
    return f"{1 / per_second:.0f} s/image"


def results_table(rows: Sequence[Mapping[str, Any]], last: str = "file") -> Table:
    """The images of a job: number, state, seed, prompt, and each row's `file` or error."""
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    table.add_column("#", justify="right", style="dim", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("seed", justify="right", style="cyan", no_wrap=True)
    table.add_column("prompt", ratio=2, no_wrap=True, overflow="ellipsis")
    table.add_column(last, ratio=3, overflow="fold")
    for row in rows:
        error = printable(row["error"] or "")
        outcome = Text(error, style="red") if error else Text(row["file"] or "")
        table.add_row(
            str(row["index"]),
            coloured(row["state"]),
            str(row["seed"]),
            Text(printable(" ".join(row["prompt"].split()))),
            outcome,
        )
    return table


def jobs_table(jobs: Sequence[Mapping[str, Any]]) -> Fitting:
    """A list of jobs, one per line, or a block each in a narrow terminal."""
    blocks = []
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    for name in ("job", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("title", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("model", overflow="fold")
    for name in ("images", "submitted"):
        table.add_column(name, justify="right", no_wrap=True)
    for job in jobs:
        counts, state = job["counts"], coloured(job["state"])
        if not State(job["state"]).finished:
            state.append(f" {job['progress']:.0%}")
        images = Text(f"{counts['succeeded']}/{counts['total']}")
        if counts["failed"]:
            images.append(f", {counts['failed']} failed", style="red")
        created = moment(job["created"]).split(" ")[0]
        title, model = Text(title_of(job)), Text(job["model"])
        table.add_row(job["id"], state, title, model, images, created)
        head = Text.assemble(job["id"], "  ", state)
        line = Text.assemble("images ", images, f"; model {model}; submitted {created}")
        blocks.append(Block(head, [line, title]))
    return Fitting(table, blocks, {"title": TITLE_WIDTH})


def job_facts(job: Mapping[str, Any]) -> Table:
    """One job's properties, one per line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    states = [state.value for state in State]
    counts = ", ".join(f"{job['counts'][s]} {s}" for s in states if job["counts"][s])
    title, is_unfinished = title_of(job), not State(job["state"]).finished
    rows: list[tuple[str, Any]] = [
        ("job", job["id"]),
        *([("title", Text(title))] if title else []),
        ("state", coloured(job["state"])),
        ("model", Text(job["model"])),
        *([("progress", f"{job['progress']:.0%} of all steps")] if is_unfinished else []),
        ("images", f"{job['counts']['total']} ({counts})"),
        ("submitted", moment(job["created"])),
    ]
    if job.get("queue_position") is not None:
        rows.append(("ahead", f"{job['queue_position']} images"))
    if job.get("eta_seconds"):
        rows.append(("left", f"about {duration(job['eta_seconds'])}"))
    rows += [("warning", Text(printable(text), style="red")) for text in job.get("warnings", ())]
    for name, value in rows:
        table.add_row(name, value)
    return table


def title_of(job: Mapping[str, Any]) -> str:
    """The job's title on one line; empty if it has none."""
    title = (job.get("metadata") or {}).get("title")
    return printable(" ".join(title.split())) if isinstance(title, str) else ""


def models_table(models: Sequence["Model"]) -> Fitting:
    """The models of a server; a block each in a narrow terminal."""
    blocks = []
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    for name in ("placement", "dtype", "default", "limits", "batch", "step"):
        table.add_column(name, no_wrap=True)
    for name in ("ready", "queued"):
        table.add_column(name, justify="right", no_wrap=True)
    for model in models:
        limits = model.limits
        sizes = "\n".join(limits.get("sizes") or ()) or f"{limits['max_pixels'] / 1e6:.2g} Mpixel"
        defaults = _defaults(model.defaults)
        ready = Text(str(model.ready_workers), style="green" if model.ready_workers else "red")
        batch, step = measured(ModelCard.from_dict(model.card).measured if model.card else None)
        counts = Text.assemble("  ", ready, f" ready, {model.queued} queued")
        facts = [
            f"{model.placement}, {model.dtype}",
            f"default {defaults}".replace("\n", ", "),
            f"limits {sizes}, {limits['max_steps']} steps".replace("\n", ", "),
            "" if batch == "–" else f"batch {batch}, {step} a step",
        ]
        blocks.append(Block(Text(model.id, style="bold").append_text(counts), facts))
        table.add_row(
            Text(model.id, style="bold"),
            model.placement,
            model.dtype,
            defaults,
            f"{sizes}\n{limits['max_steps']} steps",
            batch,
            step,
            ready,
            str(model.queued),
        )
    return Fitting(table, blocks)


def _defaults(defaults: Mapping[str, Any]) -> str:
    """Default size, steps and guidance; a dash for those that aren't known yet."""
    names = ("width", "height", "steps", "guidance_scale")
    width, height, steps, scale = ("–" if (d := defaults.get(n)) is None else d for n in names)
    scale = f"{scale:g}" if isinstance(scale, int | float) else scale
    return f"{width}x{height}\n{steps} step{'' if steps == 1 else 's'}\nguidance {scale}"


def measured(warm_up: Measured | None) -> tuple[str, str]:
    """The batch sizes and the time per step that a worker measured during warm-up.

    The batch sizes are that of `reproducible` images and the largest useful one; the time is for
    one step of the former.
    """
    if not warm_up or not warm_up.costs:
        return "–", "–"
    pinned, one_image = warm_up.pinned, warm_up.costs[0][0]
    batch = f"{pinned}, at most {warm_up.largest}"
    seconds = next((cost for tokens, cost in warm_up.costs if tokens == pinned * one_image), None)
    if seconds is None:
        return batch, "–"
    return batch, f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def workers_table(workers: Sequence["Worker"]) -> Fitting:
    """The workers of a server; a block each in a narrow terminal."""
    blocks = []
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("model", "state", "device", "host", "pid", "in flight", "finished", "steps/s"):
        right = name in ("pid", "in flight", "finished", "steps/s")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    table.add_column("error", style="red")
    for worker in workers:
        rate = worker.steps_per_second
        facts = (worker.device, worker.host, worker.pid, worker.in_flight, worker.images_done)
        table.add_row(
            Text(str(worker.model), style="bold"),
            coloured(worker.state),
            *("" if fact is None else str(fact) for fact in facts),
            "–" if rate is None else f"{rate:.1f}",
            Text(worker.error or ""),
        )
        named = zip(("on", "of", "pid"), facts, strict=False)
        finished = "" if worker.images_done is None else f"{worker.images_done} finished"
        flying = "" if worker.in_flight is None else f"{worker.in_flight} in flight"
        speeds = "" if rate is None else f"{rate:.1f} steps/s"
        head = Text.assemble((str(worker.model), "bold"), "  ", coloured(worker.state))
        where = Text(" ".join(f"{word} {fact}" for word, fact in named if fact is not None))
        pace = Text(", ".join(filter(None, [flying, finished, speeds])))
        error = Text(printable(worker.error or ""), style="red")
        blocks.append(Block(head, [where, pace, error]))
    return Fitting(table, blocks, {"error": ERROR_WIDTH})


def keys_table(keys: Sequence[Mapping[str, Any]]) -> Fitting:
    """API keys and their limits; a block each in a narrow terminal."""
    blocks = []
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("key", "tenant", "created", "weight", "unfinished images", "priority", "rate"):
        table.add_column(name, no_wrap=True)
    for key in keys:
        quota, rate = key["max_unfinished"], key["rate"]
        facts = [
            f"created {moment(key['created'])}, weight {key['weight']:g}",
            f"priority 0 to {key['max_priority']}",
            "" if quota is None else f"up to {quota} unfinished images",
            f"at most {rate}" if rate else "",
        ]
        head = Text.assemble(key["id"], "  ", (key["tenant"], "bold"))
        blocks.append(Block(head, [Text(", ".join(filter(None, facts)))]))
        table.add_row(
            key["id"],
            Text(key["tenant"], style="bold"),
            moment(key["created"]),
            f"{key['weight']:g}",
            "–" if quota is None else f"up to {quota}",
            f"0 to {key['max_priority']}",
            rate or "–",
        )
    return Fitting(table, blocks)


def recipe_table(path: Path, facts: Mapping[str, Any]) -> Table:
    """An image's recipe, one value per line, without those that are unset."""
    table = Table(box=None, pad_edge=False, show_header=False, title_justify="left")
    table.title = Text(printable(str(path)), style="bold")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value is not None:
            text = "; ".join(map(str, value)) if isinstance(value, list) else str(value)
            table.add_row(Text(printable(name.replace("_", " "))), Text(printable(text)))
    return table


def printable(text: str) -> str:
    """Replace control characters, because untrusted text could contain escape sequences."""
    return "".join(
        char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text
    )


def moment(epoch: float | None) -> str:
    """A local time; without the date if it's today."""
    if epoch is None:
        return "–"
    local = datetime.fromtimestamp(epoch).astimezone()
    is_today = local.date() == datetime.now().astimezone().date()
    return local.strftime("%H:%M:%S" if is_today else "%Y-%m-%d %H:%M")


def ready_panel(ready: "Ready") -> Panel:
    """The panel that `up` shows once it's ready."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    usable = [worker for worker in ready.workers if worker.ready]
    where = ", ".join(f"{worker.model} on {worker.device}" for worker in usable)
    facts.add_row("Page", Text(ready.url, style="cyan"))
    facts.add_row("API", Text(f"{ready.url}/docs", style="cyan"))
    facts.add_row("Models", Text(", ".join(model.name for model in ready.catalog)))
    facts.add_row("Workers", Text(f"{len(usable)} ready" + (f": {where}" if where else "")))
    for failure in ready.failures:
        facts.add_row("", Text(failure, style="red"))
    _add_access(facts, ready)
    facts.add_row("Data", Text(f"{ready.options.data} (with service.log and workers.log)"))
    facts.add_row("Try", Text(ready.example, style="green"))
    facts.add_row("Stop", Text("Ctrl-C"))
    style = "yellow" if ready.failures else "green"
    title = "imagemill is running, but no worker is ready" if not usable else "imagemill is ready"
    return Panel(facts, title=title, border_style=style, expand=False)


def _add_access(facts: Table, ready: "Ready") -> None:
    """Add rows about access, unless it's simply open to everyone on this machine."""
    callers = f"callers need one of {ready.keys} API key{'' if ready.keys == 1 else 's'}"
    if ready.is_exposed and not ready.keys:
        warning = (
            "there are no API keys: anyone who can reach this machine can use it and see all images"
        )
        facts.add_row("Open to all", Text(warning, style="bold red"))
    elif ready.is_exposed:
        warning = f"reachable from other machines over plain HTTP; {callers}"
        facts.add_row("Open", Text(warning, style="yellow"))
    elif ready.keys:
        facts.add_row("Keys", Text(f"{callers}: set IMAGEMILL_API_KEY"))
    if ready.is_exposed:
        facts.add_row("Add a key", Text(ready.add_key, style="green"))
