"""Prompt files: every format, and every error with its line."""

import io
import sys
from pathlib import Path

import pytest

from imagemill.client.errors import InvalidInput
from imagemill.commands.prompts import Prompt, read_prompts


def write(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def problems_of(path: str) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        read_prompts(path)
    return [problem.removeprefix(path) for problem in caught.value.problems]


def test_text_is_one_prompt_per_line_without_comments(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "\ufeffa red circle  \r\n\n  \n# hash\nüber \u2028 Berge\n")
    prompts = read_prompts(path)
    assert [p.text for p in prompts] == ["a red circle", "# hash", "über \u2028 Berge"]
    assert [p.source for p in prompts] == [f"{path} line {n}" for n in (1, 4, 5)]
    assert prompts[0].body() == "a red circle"


def test_jsonl_accepts_strings_and_objects(tmp_path: Path) -> None:
    lines = '"a red circle"\n\n{"prompt": "b", "steps": 8, "guidance_scale": 2, "seed": null}\n'
    prompts = read_prompts(write(tmp_path, "p.jsonl", lines))
    assert [p.body() for p in prompts] == [
        "a red circle",
        {"prompt": "b", "steps": 8, "guidance_scale": 2},
    ]


def test_jsonl_reports_every_invalid_line(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "good"}',
        "not json",
        "3",
        '{"steps": 4}',
        '{"prompt": " "}',
        '{"prompt": "a", "steps": "4"}',
        '{"prompt": "a", "seed": true}',
        '{"prompt": "a", "stepz": 4}',
    ]
    found = problems_of(write(tmp_path, "p.jsonl", "\n".join(lines)))
    assert [problem.split(":")[0] for problem in found] == [f" line {n}" for n in range(2, 9)]
    assert found[0] == " line 2: invalid JSON: Expecting value at column 1"
    assert found[4] == ' line 6: `steps` must be an integer, not "4"'
    assert found[5] == " line 7: `seed` must be an integer, not true"
    assert "unknown field `stepz`" in found[6]


def test_many_problems_are_counted_instead_of_listed(tmp_path: Path) -> None:
    found = problems_of(write(tmp_path, "p.jsonl", "x\n" * 100))
    assert len(found) == 21
    assert found[-1] == ": 80 more invalid lines"


def test_csv_has_a_header_and_optional_columns(tmp_path: Path) -> None:
    text = 'prompt,width,guidance_scale,n\n"a, b",128,2.5,\nplain,,,3\n\n"two\nlines",64,,\nlast\n'
    prompts = read_prompts(write(tmp_path, "p.csv", text))
    assert prompts[0].body() == {"prompt": "a, b", "width": 128, "guidance_scale": 2.5}
    assert prompts[1].body() == {"prompt": "plain", "n": 3}
    assert prompts[2].text == "two\nlines"
    assert prompts[2].source.endswith(" line 5")
    assert prompts[3].source.endswith(" line 7")


def test_csv_reports_every_invalid_row(tmp_path: Path) -> None:
    text = "prompt,width\na,wide\n,128\nb,128,3\nc,12\n"
    assert problems_of(write(tmp_path, "p.csv", text)) == [
        " line 2: `width` must be an integer, not 'wide'",
        " line 3: `prompt` is empty",
        " line 4: 3 cells for 2 columns (quote cells that contain commas)",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("text,width\na,1\n", "including `prompt`"),
        ("prompt,wodth\na,1\n", "unknown field `wodth`"),
        ("prompt,seed,seed\na,1,2\n", "duplicate column `seed`"),
        ('prompt\n"open\n', "line 2: invalid CSV"),
    ],
)
def test_invalid_csv(tmp_path: Path, text: str, said: str) -> None:
    found = problems_of(write(tmp_path, "p.csv", text))
    assert len(found) == 1
    assert said in found[0]


def test_files_without_prompts(tmp_path: Path) -> None:
    assert problems_of(write(tmp_path, "p.txt", "\n \n")) == [": contains no prompts"]
    assert problems_of(str(tmp_path / "none.txt")) == [": No such file or directory"]
    assert problems_of(write(tmp_path, "q.txt", b"good\n\xff\n")) == [" line 2: invalid UTF-8"]


@pytest.mark.parametrize(
    ("text", "body"),
    [("a red circle\n", "a red circle"), ('{"prompt": "a", "n": 2}\n', {"prompt": "a", "n": 2})],
)
def test_standard_input(monkeypatch: pytest.MonkeyPatch, text: str, body: object) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    (prompt,) = read_prompts("-")
    assert prompt.body() == body
    assert prompt.source == "stdin line 1"


@pytest.mark.parametrize(
    ("text", "bodies"),
    [
        ("prompt,seed\na red star,5\n", [{"prompt": "a red star", "seed": 5}]),
        ('\ufeff\n seed ,"prompt"\r\n5,"a, b"\r\n', [{"prompt": "a, b", "seed": 5}]),
        ("prompt\na\nb\n", ["a", "b"]),
        ("a prompt, by hand\nprompt,seed\n", ["a prompt, by hand", "prompt,seed"]),
        ('say "prompt, now"\nb\n', ['say "prompt, now"', "b"]),
        ('["a", {"prompt": "b"}]', ["a", "b"]),
        ("x" * 200_000, ["x" * 200_000]),
    ],
)
def test_the_format_of_standard_input_is_detected_from_its_beginning(
    monkeypatch: pytest.MonkeyPatch, text: str, bodies: list[object]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert [prompt.body() for prompt in read_prompts("-")] == bodies


def test_csv_from_standard_input_reports_invalid_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"prompt,stepz\na,1\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    with pytest.raises(InvalidInput, match="stdin line 1: unknown field `stepz`"):
        read_prompts("-")


def test_a_prompt_without_fields_is_a_string() -> None:
    assert Prompt("a").body() == "a"


@pytest.mark.parametrize("form", ["{}", '{{"prompts": {}}}'])
def test_json_is_a_list_or_an_object_with_a_list(tmp_path: Path, form: str) -> None:
    text = form.format('["a", {"prompt": "b", "seed": 3}]')
    prompts = read_prompts(write(tmp_path, "p.json", text))
    assert [p.body() for p in prompts] == ["a", {"prompt": "b", "seed": 3}]


def test_json_reports_which_prompt_is_invalid(tmp_path: Path) -> None:
    bad = '["fine", {"prompt": "x", "seed": "y"}, 7]'
    said = problems_of(write(tmp_path, "p.json", bad))
    assert said[0].startswith(" prompt 2: `seed` must be") and said[1].startswith(" prompt 3: ")
    assert problems_of(write(tmp_path, "q.json", '["a",\n')) == [
        " line 2: invalid JSON: Expecting value"
    ]
    assert "must be a list" in problems_of(write(tmp_path, "r.json", '{"model": "demo"}'))[0]
