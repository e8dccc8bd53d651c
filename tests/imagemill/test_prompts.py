"""Prompt files: every format, and every error with its line."""

import io
import sys
import tracemalloc
from pathlib import Path

import pytest

from imagemill.client.errors import InvalidInput
from imagemill.commands import prompt_bytes
from imagemill.commands import prompts as prompts_module
from imagemill.commands.prompts import Prompt, read_prompts


def write(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def problems_of(path: str) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        read_prompts(path)
    return [problem.removeprefix(path) for problem in caught.value.problems]


def test_text_is_one_prompt_per_line_except_comments(tmp_path: Path) -> None:
    text = "\ufeffa red circle  \r\n\n # for later\n\\# hash\nüber \u2028 Berge\n"
    path = write(tmp_path, "p.txt", text)
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
    assert problems_of(write(tmp_path, "q.txt", "# nothing\n")) == [": contains no prompts"]


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


TABLE = "Prompt{0}Negative Prompt{0}STEPS{0}Seed\n# a comment\na star{0}fog{0}8.0{0}5\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", TABLE.format(",")),
        ("p.csv", TABLE.format(";")),
        ("p.csv", "sep=;\n" + TABLE.format(";")),
        ("p.tsv", TABLE.format("\t")),
        ("p.csv", TABLE.format("\t")),
        ("P.CSV", "# first\n" + TABLE.format(",")),
    ],
)
def test_tables_of_every_program(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    (prompt,) = read_prompts(write(tmp_path, name, text.encode(encoding)))
    fields = {"negative_prompt": "fog", "steps": 8, "seed": 5}
    assert prompt.body() == {"prompt": "a star", **fields}
    assert isinstance(prompt.fields["steps"], int)
    assert prompt.source.endswith(f" line {text.count(chr(10))}")


def test_the_decimal_comma_of_a_semicolon_table(tmp_path: Path) -> None:
    text = "prompt;guidance_scale;n\na, b;2,5;2,0\n"
    (prompt,) = read_prompts(write(tmp_path, "p.csv", text))
    assert prompt.body() == {"prompt": "a, b", "guidance_scale": 2.5, "n": 2}
    found = problems_of(write(tmp_path, "q.csv", "prompt;n\na;b;2\n"))
    assert found == [" line 2: 3 cells for 2 columns (quote cells that contain semicolons)"]


def test_comments_in_tables_and_jsonl(tmp_path: Path) -> None:
    table = read_prompts(write(tmp_path, "p.csv", "prompt,n\n# a,1\n\\#1 dog,\n"))
    assert [prompt.text for prompt in table] == ["#1 dog"]
    lines = read_prompts(write(tmp_path, "p.jsonl", '# a\n"b"\n'))
    assert [(prompt.text, prompt.source[-6:]) for prompt in lines] == [("b", "line 2")]


@pytest.mark.parametrize(
    ("cell", "value"), [("8", 8), ("8.0", 8), ("8,0", None), ("1.5E+3", 1500), ("8.5", None)]
)
def test_integers_as_spreadsheets_write_them(tmp_path: Path, cell: str, value: int | None) -> None:
    path = write(tmp_path, "p.csv", f'prompt,steps\na,"{cell}"\n')
    if value is None:
        assert problems_of(path) == [f" line 2: `steps` must be an integer, not {cell!r}"]
    else:
        assert read_prompts(path)[0].fields == {"steps": value}


@pytest.mark.parametrize("cell", ["nan", "inf", "1e999999999", "9" * 5000])
def test_integers_that_never_end(tmp_path: Path, cell: str) -> None:
    (problem,) = problems_of(write(tmp_path, "p.csv", f"prompt,seed\na,{cell}\n"))
    assert "`seed` must be an integer" in problem


def test_json_integers_may_have_a_point(tmp_path: Path) -> None:
    path = write(tmp_path, "p.json", '[{"prompt": "a", "steps": 8.0}]')
    assert repr(read_prompts(path)[0].fields) == "{'steps': 8}"
    path = write(tmp_path, "q.json", '[{"prompt": "a", "steps": 8.5}]')
    assert problems_of(path) == [" prompt 1: `steps` must be an integer, not 8.5"]


@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
@pytest.mark.parametrize("text", ["[" * 200_000, '{"prompt": "a", "seed": ' + "9" * 5000 + "}"])
def test_json_that_python_refuses_to_parse(tmp_path: Path, name: str, text: str) -> None:
    (problem,) = problems_of(write(tmp_path, name, text))
    assert "invalid JSON" in problem


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("good\nschön\n".encode("cp1252"), " line 2: invalid UTF-8; the file is probably in Windo"),
        (b"good\n\x81\xff\n", " line 2: invalid UTF-8; save the file as UTF-8"),
        (b"good\n\xff\x00\n", " line 2: invalid UTF-8; the file is probably binary"),
        (
            "a\nb".encode("utf-16-le"),
            " line 1: contains NUL characters; it's either binary, or UTF",
        ),
        ("a".encode("utf-16") + b"x", " line 1: invalid UTF-16"),
        (b"PK\x03\x04...", ": not text but a ZIP archive or a spreadsheet"),
        (b"\x89PNG\r\n", ": not text but a picture"),
    ],
)
def test_other_files_are_refused_with_the_likely_cause(
    tmp_path: Path, data: bytes, said: str
) -> None:
    (problem,) = problems_of(write(tmp_path, "p.txt", data))
    assert problem.startswith(said)
    if "Windows" in problem:
        assert "this byte is 'ö'" in problem and "iconv -f WINDOWS-1252 -t UTF-8" in problem


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """The file is sparse; only as much as the limit is read."""
    path = tmp_path / "p.txt"
    with path.open("wb") as file:
        file.truncate(2**40)
    (problem,) = problems_of(str(path))
    assert problem.startswith(": larger than 32 MiB, which is more than one job takes; split it")


def test_too_many_prompts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts_module, "MOST_PROMPTS", 3)
    assert len(read_prompts(write(tmp_path, "p.txt", "a\n" * 3))) == 3
    (problem,) = problems_of(write(tmp_path, "p.txt", "a\n" * 4))
    assert problem.startswith(": more than 3 prompts, which is more than one job takes; split it")


def test_the_lines_of_a_file_are_not_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of comments and blank lines needs no more than a few copies of its text."""
    text = "#\n\n" * 200_000
    monkeypatch.setattr(prompt_bytes, "LARGEST_FILE", len(text))
    path = write(tmp_path, "p.txt", text)
    tracemalloc.start()
    try:
        assert problems_of(path) == [": contains no prompts"]
        assert tracemalloc.get_traced_memory()[1] < 10 * len(text)
    finally:
        tracemalloc.stop()
