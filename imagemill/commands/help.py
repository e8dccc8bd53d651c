"""The `--help` of every command: flags in groups, whole names at any width, and examples."""

from typing import Any

from typer.core import TyperCommand, TyperGroup

GROUPS = {
    "Prompts": ["file", "expand", "wildcards", "n"],
    "Pictures": [
        "size",
        "width",
        "height",
        "steps",
        "guidance_scale",
        "negative_prompt",
        "seed",
        "format",
        "fast",
    ],
    "Job": [
        "model",
        "priority",
        "title",
        "metadata",
        "webhook",
        "idempotency_key",
        "detach",
        "resume",
    ],
    "Output": ["out", "watch", "pictures", "as_json"],
    "Server": ["server", "data", "models", "host", "port"],
}
"""Where each flag is shown; all others are under `Options`."""

COMMANDS = {
    "Pictures": ["generate", "inspect", "replay"],
    "Jobs": ["status", "download", "cancel", "retry", "delete"],
    "Server": ["up", "down", "logs", "models", "workers", "keys"],
    "Parts of a server": ["serve", "worker"],
    "Setup": ["init", "doctor", "plan"],
}
"""Where each command is shown; those of a group of commands are under `Commands`."""

EXAMPLES = {
    "generate": (
        'imagemill generate "a red circle" "a blue heart" --out out/two',
        "imagemill generate --file prompts.csv --size 128x128 --n 2",
        'imagemill generate "a {red|blue} star" --expand',
        "imagemill generate --resume JOB",
    ),
    "up": ("imagemill up", "imagemill up --port 0 --data /srv/imagemill"),
    "status": ("imagemill status", "imagemill status JOB --watch"),
    "download": ("imagemill download JOB --out out/hearts",),
    "logs": ("imagemill logs workers --follow",),
    "plan": ("imagemill plan demo", "imagemill plan OWNER/MODEL --devices 2x24GB"),
    "replay": ("imagemill replay out/0000-a-red-circle.png",),
}

_PLACEHOLDERS = {"int": "N", "float": "NUMBER", "path": "PATH", "str": "TEXT"}


class Command(TyperCommand):
    """A command with our help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write usage, description, groups of flags, and examples."""
        _write_help(self, ctx, formatter)


class CommandGroup(TyperGroup):
    """A group of commands with our help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write usage, description, groups of commands, flags, and the epilog."""
        _write_help(self, ctx, formatter)


def _write_help(command: Any, ctx: Any, formatter: Any) -> None:
    command.format_usage(ctx, formatter)
    command.format_help_text(ctx, formatter)
    commands: dict[str, list[tuple[str, str]]] = {}
    for name, inner in getattr(command, "commands", {}).items():
        title = next((title for title, names in COMMANDS.items() if name in names), "Commands")
        commands.setdefault(title, []).append((name, inner.get_short_help_str(limit=200)))
    _write_sections(formatter, commands, (*COMMANDS, "Commands"))
    rows: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(ctx):
        if not getattr(param, "hidden", False):
            rows.setdefault(_group_of(param), []).append((_names(param, ctx), _about(param)))
    _write_sections(formatter, rows, ("Arguments", *GROUPS, "Options"))
    if examples := EXAMPLES.get(command.name or ""):
        with formatter.section("Examples"):
            for example in examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")
    command.format_epilog(ctx, formatter)


def _write_sections(
    formatter: Any, rows: dict[str, list[tuple[str, str]]], titles: tuple[str, ...]
) -> None:
    for title in titles:
        if title in rows:
            with formatter.section(title):
                formatter.write_dl(rows[title])


def _group_of(param: Any) -> str:
    if param.param_type_name == "argument":
        return "Arguments"
    return next((title for title, names in GROUPS.items() if param.name in names), "Options")


def _names(param: Any, ctx: Any) -> str:
    if param.param_type_name == "argument":
        return str(param.metavar or param.name.upper())
    names = ", ".join(sorted(param.opts, key=len))
    return names if param.is_flag else f"{names} {param.metavar or _placeholder(param, ctx)}"


def _placeholder(param: Any, ctx: Any) -> str:
    kind = str(param.display_type(ctx)).strip("<>").removesuffix(" range")
    return _PLACEHOLDERS.get(kind, kind if "|" in kind else "TEXT")


def _about(param: Any) -> str:
    notes = [f"env: {param.envvar}"] if param.envvar else []
    if not param.required and param.default not in (None, False) and not callable(param.default):
        notes.append(f"default: {param.default}")
    return " ".join([param.help or "", *([f"[{'; '.join(notes)}]"] if notes else [])]).strip()
