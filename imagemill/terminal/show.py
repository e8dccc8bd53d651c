"""What people see: tables, times and speeds, the panel of `up`.

Takes plain values and gives what a rich console prints; talks to no server.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jobs.job import State

if TYPE_CHECKING:
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


def coloured(state: str) -> Text:
    """A state's name in its colour."""
    return Text(state, style=COLOURS.get(state, ""))


def duration(seconds: float | None) -> str:
    """`8 s`, `1:05 min`, `2:03:00 h`; a dash when unknown."""
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
    """`1.3 images/s`, or a time per image where they are slower than one in ten seconds."""
    if not per_second:
        return "–"
    if per_second >= 0.1:
        return f"{per_second:.1f} images/s"
    return f"{1 / per_second:.0f} s/image"


def results_table(rows: Sequence[Mapping[str, Any]], last: str = "file") -> Table:
    """The images of a job: number, state, seed, prompt, and each row's `file` or its error."""
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    table.add_column("#", justify="right", style="dim", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("seed", justify="right", style="cyan", no_wrap=True)
    table.add_column("prompt", ratio=2, no_wrap=True, overflow="ellipsis")
    table.add_column(last, ratio=3, no_wrap=True, overflow="ellipsis")
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


def jobs_table(jobs: Sequence[Mapping[str, Any]]) -> Table:
    """A list of jobs, a line each."""
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
        table.add_row(job["id"], state, Text(title_of(job)), Text(job["model"]), images, created)
    return table


def job_facts(job: Mapping[str, Any]) -> Table:
    """One job's own facts, a line each."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    states = [state.value for state in State]
    counts = ", ".join(f"{job['counts'][s]} {s}" for s in states if job["counts"][s])
    title, is_going = title_of(job), not State(job["state"]).finished
    rows: list[tuple[str, Any]] = [
        ("job", job["id"]),
        *([("title", Text(title))] if title else []),
        ("state", coloured(job["state"])),
        ("model", Text(job["model"])),
        *([("progress", f"{job['progress']:.0%} of all steps")] if is_going else []),
        ("images", f"{job['counts']['total']} ({counts})"),
        ("submitted", moment(job["created"])),
    ]
    if job.get("queue_position") is not None:
        rows.append(("in front", f"{job['queue_position']} images"))
    if job.get("eta_seconds"):
        rows.append(("left", f"about {duration(job['eta_seconds'])}"))
    rows += [("warning", Text(printable(one), style="red")) for one in job.get("warnings", ())]
    for name, value in rows:
        table.add_row(name, value)
    return table


def title_of(job: Mapping[str, Any]) -> str:
    """What the job's owner calls it, on one line; blank where nobody named it."""
    title = (job.get("metadata") or {}).get("title")
    return printable(" ".join(title.split())) if isinstance(title, str) else ""


def models_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """The catalog as served."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    for name in ("placement", "dtype", "default", "limits", "batch", "step"):
        table.add_column(name, no_wrap=True)
    for name in ("ready", "queued"):
        table.add_column(name, justify="right", no_wrap=True)
    for model in models:
        usual, limits = model["defaults"], model["limits"]
        sizes = "\n".join(limits.get("sizes") or ()) or f"{limits['max_pixels'] / 1e6:.2g} Mpixel"
        ready = int(model["ready_workers"])
        table.add_row(
            Text(model["id"], style="bold"),
            model["placement"],
            model["dtype"],
            _usual(usual),
            f"{sizes}\n{limits['max_steps']} steps",
            *measured(model.get("card")),
            Text(str(ready), style="green" if ready else "red"),
            str(model["queued"]),
        )
    return table


def _usual(defaults: Mapping[str, Any]) -> str:
    """Size, steps and guidance of an image that asks for none; a dash for what isn't known yet."""
    names = ("width", "height", "steps", "guidance_scale")
    width, height, steps, scale = ("–" if (d := defaults.get(n)) is None else d for n in names)
    scale = f"{scale:g}" if isinstance(scale, int | float) else scale
    return f"{width}x{height}\n{steps} step{'' if steps == 1 else 's'}\nguidance {scale}"


def measured(card: Mapping[str, Any] | None) -> tuple[str, str]:
    """What warm-up found, once a worker has loaded the model: batches, and a step's time.

    The batches are that of `reproducible` images and the largest that pays; the time is of one
    step of the former, which the card tells by tokens and first for a batch of one image.
    """
    if not card or not card.get("costs") or not card.get("pinned"):
        return "–", "–"
    pinned, costs = int(card["pinned"]), card["costs"]
    one_image = costs[0][0]
    batch = f"{pinned}, at most {card['largest']}"
    seconds = next((cost for tokens, cost in costs if tokens == pinned * one_image), None)
    if seconds is None:
        return batch, "–"
    return batch, f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def workers_table(workers: Sequence[Mapping[str, Any]]) -> Table:
    """Who runs what, where, how fast."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("model", "state", "device", "host", "pid", "in flight", "made", "steps/s"):
        right = name in ("pid", "in flight", "made", "steps/s")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    table.add_column("error", style="red")
    for worker in workers:
        rate = worker.get("steps_per_second")
        table.add_row(
            Text(str(worker.get("model")), style="bold"),
            coloured(worker["state"]),
            str(worker.get("device", "")),
            str(worker.get("host", "")),
            str(worker.get("pid", "")),
            str(worker.get("in_flight", "")),
            str(worker.get("images_done", "")),
            "–" if rate is None else f"{rate:.1f}",
            Text(worker.get("error") or ""),
        )
    return table


def keys_table(keys: Sequence[Mapping[str, Any]]) -> Table:
    """API keys and what each may do."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("key", "tenant", "made", "weight", "unfinished images", "priority", "rate"):
        table.add_column(name, no_wrap=True)
    for key in keys:
        quota, rate = key["max_unfinished"], key["rate"]
        table.add_row(
            key["id"],
            Text(key["tenant"], style="bold"),
            moment(key["created"]),
            f"{key['weight']:g}",
            "–" if quota is None else f"up to {quota}",
            f"0 to {key['max_priority']}",
            rate or "–",
        )
    return table


def recipe_table(path: Path, facts: Mapping[str, Any]) -> Table:
    """What a picture was made of, a fact a line; what was not given is left out."""
    table = Table(box=None, pad_edge=False, show_header=False, title_justify="left")
    table.title = Text(printable(str(path)), style="bold")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value is not None:
            table.add_row(Text(printable(name.replace("_", " "))), Text(printable(str(value))))
    return table


def printable(text: str) -> str:
    """Text out of a file from anywhere, without what could give a terminal orders."""
    return "".join(
        one if one.isprintable() or one == "\n" else "\N{REPLACEMENT CHARACTER}" for one in text
    )


def moment(epoch: float | None) -> str:
    """A time for people: the clock alone if it was today."""
    if epoch is None:
        return "–"
    local = datetime.fromtimestamp(epoch).astimezone()
    is_today = local.date() == datetime.now().astimezone().date()
    return local.strftime("%H:%M:%S" if is_today else "%Y-%m-%d %H:%M")


def ready_panel(ready: "Ready") -> Panel:
    """What `up` shows once images can be made."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    usable = [worker for worker in ready.workers if worker["state"] == "ready"]
    where = ", ".join(f"{worker['model']} on {worker.get('device')}" for worker in usable)
    facts.add_row("Page", Text(ready.url, style="cyan"))
    facts.add_row("API", Text(f"{ready.url}/docs", style="cyan"))
    facts.add_row("Models", Text(", ".join(model.name for model in ready.catalog)))
    facts.add_row("Workers", Text(f"{len(usable)} ready" + (f": {where}" if where else "")))
    for failure in ready.failures:
        facts.add_row("", Text(failure, style="red"))
    _add_reach(facts, ready)
    facts.add_row("Data", Text(f"{ready.options.data} (with service.log and workers.log)"))
    facts.add_row("Try", Text(ready.example, style="green"))
    facts.add_row("Stop", Text("Ctrl-C"))
    style = "yellow" if ready.failures else "green"
    title = "imagemill is up, but no worker is ready" if not usable else "imagemill is ready"
    return Panel(facts, title=title, border_style=style, expand=False)


def _add_reach(facts: Table, ready: "Ready") -> None:
    """Who can use it, where that is not simply everybody on this machine."""
    callers = f"callers need one of {ready.keys} API key{'' if ready.keys == 1 else 's'}"
    if ready.is_exposed and not ready.keys:
        warning = "without a key, whoever reaches this machine can use it and see all its images"
        facts.add_row("Open to all", Text(warning, style="bold red"))
    elif ready.is_exposed:
        warning = f"other machines can reach it over plain HTTP; {callers}"
        facts.add_row("Open", Text(warning, style="yellow"))
    elif ready.keys:
        facts.add_row("Keys", Text(f"{callers}: set IMAGEMILL_API_KEY"))
    if ready.is_exposed:
        facts.add_row("Add a key", Text(ready.add_key, style="green"))
