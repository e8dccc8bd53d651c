"""Every encoding, a reader that goes away, and `--size`."""

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from imagemill.client.file_names import file_name
from imagemill.terminal.output import print_json
from tests.end_to_end.deployment import COMMAND, environment
from tests.imagemill.fake_server import FakeServer
from tests.imagemill.test_generate import run, server

__all__ = ["server"]

PROMPT = "\u661f \u00fcber \u201cBerge\u201d"


@pytest.mark.parametrize(
    "locale",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["ascii output", "a C locale without UTF-8"],
)
def test_a_prompt_in_a_terminal_that_cannot_show_it(
    server: FakeServer, tmp_path: Path, locale: dict[str, str]
) -> None:
    file = tmp_path / "p.txt"
    file.write_text(PROMPT, encoding="utf-8")
    env = {**environment(), **locale, "IMAGEMILL_SERVER": server.url}

    def call(*arguments: str) -> str:
        done = subprocess.run(
            [*COMMAND, *arguments], env=env, cwd=tmp_path, capture_output=True, check=False
        )
        said = done.stdout + done.stderr
        assert (done.returncode, b"Traceback" in said) == (0, False), said.decode()
        return done.stdout.decode("ascii")

    assert "1 of 1 images in out" in call("generate", "-f", str(file))
    assert "job-1" in call("status") and "? ?ber" in call("status", "job-1")
    assert json.loads(call("status", "job-1", "--json"))["images"][0]["prompt"] == PROMPT
    assert len(list((tmp_path / "out").glob("0000-*.png"))) == 1
    assert "generate" in call("--help")


def test_json_is_ascii_only_where_it_must_be() -> None:
    for encoding, text in (("utf-8", '"\u00fc"\n'), ("ascii", '"\\u00fc"\n')):
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        print_json("\u00fc", file)
        assert file.buffer.getvalue().decode(encoding) == text


def test_file_names_in_a_locale_without_their_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsencode", lambda text: text.encode("ascii"))
    assert file_name(0, "a \u661f star", ".png") == "0000-a-star.png"
    assert file_name(1, "\u661f", ".png") == "0001-image.png"


@pytest.fixture
def cut(server: FakeServer, tmp_path: Path) -> Any:
    """Run `generate ... | head -n 1`: returns the exit code and standard error."""

    def call(*arguments: str) -> tuple[int, str]:
        with subprocess.Popen(
            [*COMMAND, "generate", *arguments, "--out", str(tmp_path)],
            env={**environment(), "IMAGEMILL_SERVER": server.url},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        ) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            process.stdout.close()
            _, errors = process.communicate()
        return process.returncode, errors.decode()

    return call


def test_generate_goes_on_if_its_reader_goes_away(cut: Any, tmp_path: Path) -> None:
    code, errors = cut("a", "b", "c")
    assert code == 0, errors
    assert "Traceback" not in errors and "Exception ignored" not in errors
    assert f"the output's reader is gone; images are still saved in {tmp_path}" in errors
    assert f"Ctrl-C stops; to resume: imagemill generate --resume job-1 --out {tmp_path}" in errors
    assert f"3 of 3 images in {tmp_path}" in errors
    assert len(list(tmp_path.glob("000?-*.png"))) == 3


def test_a_failure_without_a_reader_says_how_to_resume(
    cut: Any, server: FakeServer, tmp_path: Path
) -> None:
    server.fails = {"b"}
    code, errors = cut("a", "b")
    assert code == 1
    assert f"\nto resume: imagemill generate --resume job-1 --out {tmp_path}" in errors
    assert (tmp_path / "0000-a.png").exists()


@pytest.mark.parametrize("size", ["64x32", "64X32", " 64 x 32", "64\u00d732"])
def test_size(server: FakeServer, tmp_path: Path, size: str) -> None:
    assert run("generate", "a", "--size", size, "--out", tmp_path).exit_code == 0
    assert (server.bodies[0]["width"], server.bodies[0]["height"]) == (64, 32)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--size", "64"], "--size '64': expected WIDTHxHEIGHT, such as 1024x768"),
        (["--size", "64x-32"], "expected WIDTHxHEIGHT"),
        (["--size", "64x32", "--width", "64"], "use either --size or --width and --height"),
    ],
)
def test_a_bad_size(server: FakeServer, tmp_path: Path, flags: list[str], said: str) -> None:
    done = run("generate", "a", *flags, "--out", tmp_path)
    assert (done.exit_code, said in done.stderr) == (2, True), done.stderr
    done = run("generate", "--resume", "job-1", "--size", "64x32", "--out", tmp_path)
    assert "--resume takes no --size" in done.stderr
