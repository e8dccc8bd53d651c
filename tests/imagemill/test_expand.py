"""`--expand`: choices and wildcards, their order, and what is refused."""

from pathlib import Path

import pytest

from imagemill.client.errors import InvalidInput
from imagemill.commands import expand as module
from imagemill.commands.expand import expand
from imagemill.commands.prompts import Prompt
from tests.imagemill.fake_server import FakeServer
from tests.imagemill.test_generate import run, server

__all__ = ["server"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "colour.txt").write_text("# warm\nred\n{dark|light} blue\n\n")
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "big_shape.txt").write_text("__colour__ star\n")
    (tmp_path / "loop.txt").write_text("a __again__\n")
    (tmp_path / "again.txt").write_text("b __loop__\n")
    (tmp_path / "empty.txt").write_text("\n")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("a star", ["a star"]),
        ("two  spaces", ["two  spaces"]),
        ("{red|blue} star", ["red star", "blue star"]),
        ("{a|b} {1|2}", ["a 1", "a 2", "b 1", "b 2"]),
        ("{red|{dark|light} blue} star", ["red star", "dark blue star", "light blue star"]),
        ("a {large|} star", ["a large star", "a star"]),
        ("{red|red|blue}", ["red", "blue"]),
        ("a {red} star", ["a red star"]),
        ("a | b } c", ["a | b } c"]),
        (r"\{a\|b\} {c|\|}", ["{a|b} c", "{a|b} |"]),
        ("__colour__ ring", ["red ring", "dark blue ring", "light blue ring"]),
        ("__thing/big_shape__", ["red star", "dark blue star", "light blue star"]),
        ("{__colour__|pink}", ["red", "dark blue", "light blue", "pink"]),
        ("snake_case __ and ____", ["snake_case __ and ____"]),
    ],
)
def test_expansion(folder: Path, text: str, texts: list[str]) -> None:
    assert [prompt.text for prompt in expand([Prompt(text)], folder)] == texts


def test_fields_and_sources_are_kept(folder: Path) -> None:
    given = Prompt("{a|b}", {"seed": 5}, "p.txt line 3")
    assert expand([given, Prompt("c")], folder) == [
        Prompt("a", {"seed": 5}, "p.txt line 3"),
        Prompt("b", {"seed": 5}, "p.txt line 3"),
        Prompt("c"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a {red|blue star", "p.txt line 3: a { is never closed; write \\{ for a brace"),
        ("__none__", "none.txt for __none__; --wildcards names the folder"),
        ("__loop__", "__loop__ contains itself: loop > again > loop"),
        ("__empty__", "empty.txt is empty"),
        ("{a|b}" * 40, "1099511627776 combinations, more than"),
        ("{" * 5000, "choices are nested more than 20 deep"),
        ("{a|b|c}" * 8 + "x" * 20_000, "combinations of up to 20008 characters are too much"),
    ],
)
def test_what_is_refused(folder: Path, text: str, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        expand([Prompt(text, source="p.txt line 3")], folder)
    assert said in str(caught.value) and str(caught.value).startswith("p.txt line 3: ")


def test_too_many_in_total(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PROMPTS", 3)
    assert len(expand([Prompt("{a|b}"), Prompt("c")], folder)) == 3
    with pytest.raises(InvalidInput, match="more than 3 prompts"):
        expand([Prompt("{a|b}"), Prompt("{c|d}")], folder)


def test_the_command_expands_only_if_asked_and_says_so_first(
    server: FakeServer, folder: Path
) -> None:
    text, out = "{red|blue} star", folder / "out"
    assert run("generate", text, "--out", out).exit_code == 0
    done = run("generate", text, "ring", "--expand", "--out", out)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "--expand: 2 prompts became 3"
    assert lines[1] == "job job-2: 3 images of demo"
    done = run("generate", "__colour__", "--wildcards", folder, "--out", out)
    assert "--expand: 1 prompt became 3" in done.output
    assert [body["prompts"] for body in server.bodies] == [
        [text],
        ["red star", "blue star", "ring"],
        ["red", "dark blue", "light blue"],
    ]
    assert run("generate", "{a|b", "--expand", "--out", out).exit_code == 2
    assert len(server.bodies) == 3
