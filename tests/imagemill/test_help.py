"""`--help`: grouped, with whole names at any width, and examples that work."""

import shlex
from typing import Any

import pytest
import typer.main

from imagemill.cli import app
from imagemill.commands.help import COMMANDS, EXAMPLES, GROUPS
from tests.imagemill.test_generate import run

TOP: Any = typer.main.get_command(app)
CALLS = [
    [*words, *inner]
    for words in [[], *([name] for name in TOP.commands)]
    for inner in [[], *([n] for n in getattr(TOP.commands.get("".join(words)), "commands", ()))]
]


@pytest.mark.parametrize("width", ["60", "80", "120"])
@pytest.mark.parametrize("words", CALLS, ids=" ".join)
def test_every_name_is_whole(words: list[str], width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    done = run(*words, "--help")
    assert done.exit_code == 0
    assert "<" not in done.output and "\N{HORIZONTAL ELLIPSIS}" not in done.output
    command = TOP
    for word in words:
        command = command.commands[word]
    names = [name for param in command.params for name in param.opts if not param.hidden]
    for name in [*names, *getattr(command, "commands", ())]:
        shown = name if name.startswith("-") or name in getattr(command, "commands", ()) else ""
        assert shown in done.output.split() or f"{shown}," in done.output.split() or not shown


def test_every_command_is_in_a_group() -> None:
    assert {name for names in COMMANDS.values() for name in names} == set(TOP.commands)
    output = run("--help").output
    assert all(f"\n{title}:\n" in output for title in COMMANDS)


def test_the_flags_of_generate_are_grouped() -> None:
    output = run("generate", "--help").output
    assert all(f"\n{title}:\n" in output for title in GROUPS)
    assert output.rpartition("\nOptions:\n")[2].split("Examples:")[0].split() == [
        *("--help", "Show", "this", "message", "and", "exit.")
    ]


@pytest.mark.parametrize(
    "example", [line for lines in EXAMPLES.values() for line in lines], ids=str
)
def test_examples_have_valid_flags(example: str) -> None:
    program, name, *words = shlex.split(example)
    assert program == "imagemill" and example in run(name, "--help").output
    flags = {flag for param in TOP.commands[name].params for flag in param.opts}
    assert {word for word in words if word.startswith("-")} <= flags
