"""Detaching from, changing and deleting jobs; the job's own flags; errors in one sentence."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from imagemill.cli import app
from imagemill.commands.generate import _sentence
from tests.imagemill.fake_server import FakeServer
from tests.imagemill.test_generate import run, server

__all__ = ["server"]


def test_detach_then_resume(server: FakeServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    left = run("generate", "a", "b", "--detach", "--out", out)
    assert left.exit_code == 0, left.output
    assert "job job-1: 2 images of demo" in left.output
    assert not out.exists() and "GET /v1/jobs/ID" not in server.calls
    (line,) = [line for line in left.output.splitlines() if "--resume" in line]
    words = shlex.split(line.removeprefix("to download its images: "))
    assert words[0] == "imagemill"
    done = run(*words[1:])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in out.iterdir()) == ["0000-a.png", "0001-b.png", "sheet.png"]
    assert server.calls["POST /v1/jobs"] == 1


def test_detach_as_json(server: FakeServer, tmp_path: Path) -> None:
    left = run("generate", "a", "-d", "--out", tmp_path, "--json")
    document = json.loads(left.stdout)
    assert (document["job"], document["state"], document["counts"]["total"]) == (
        "job-1",
        "queued",
        1,
    )
    assert document["resume"].startswith(f"imagemill generate --resume job-1 --out {tmp_path}")


def test_detach_never_starts_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAGEMILL_SERVER", raising=False)
    done = run("generate", "a", "--detach", "--data", tmp_path)
    assert done.exit_code == 1
    assert f"no server is running on the data folder {tmp_path}" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_failed_images_are_queued_again(server: FakeServer, tmp_path: Path) -> None:
    server.fails = {"bad"}
    run("generate", "good", "bad", "--out", tmp_path)
    done = run("retry", "job-1")
    assert (done.exit_code, done.output) == (0, "job-1: running; 1 of 2 images queued\n")
    assert server.jobs["job-1"]["images"][1]["state"] == "queued"
    assert server.jobs["job-1"]["images"][0]["state"] == "succeeded"


def test_jobs_are_deleted(server: FakeServer, tmp_path: Path) -> None:
    for prompt in "abc":
        run("generate", prompt, "--detach")
    assert run("delete", "job-1").output == "job-1: deleted\n"
    done = run("delete", "job-2", "job-3", "--json")
    assert json.loads(done.stdout) == [
        {"id": "job-2", "deleted": True},
        {"id": "job-3", "deleted": True},
    ]
    assert server.jobs == {}


@pytest.mark.parametrize("command", ["cancel", "retry", "delete"])
def test_an_unknown_job_stops_the_command(server: FakeServer, command: str) -> None:
    run("generate", "a", "--detach")
    done = run(command, "job-1", "job-9", "job-1")
    assert done.exit_code == 1
    assert done.stderr == "error: nothing at /v1/jobs/job-9 (HTTP 404)\n"
    assert done.stdout.startswith("job-1: ") and done.stdout.count("\n") == 1


def test_the_jobs_own_flags_reach_the_server(server: FakeServer, tmp_path: Path) -> None:
    flags = ["--fast", "--webhook", "https://h/x", "--metadata", "for=wall", "--metadata", "a=b=c"]
    assert run("generate", "red", *flags, "--out", tmp_path).exit_code == 0
    run("generate", "red", "--metadata", "title=Mine", "--out", tmp_path)
    body, titled = server.bodies
    assert body["reproducible"] is False
    assert body["webhook"] == {"url": "https://h/x"}
    assert body["metadata"] == {"for": "wall", "a": "b=c", "title": "red"}
    assert titled == {"model": "demo", "prompts": ["red"], "metadata": {"title": "Mine"}}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a", "--metadata", "alone"], "invalid --metadata 'alone': expected KEY=VALUE"),
        (["a", "--metadata", "=b"], "invalid --metadata '=b': expected KEY=VALUE"),
        (["a", "--metadata", "k=1", "--metadata", "k=2"], "`k` is given twice"),
        (["a", "--metadata", "title=T", "--title", "U"], "not both"),
        (["a", "--detach", "--watch"], "--detach doesn't work with --watch"),
        (["--resume", "job-1", "--detach"], "use `imagemill retry JOB`"),
        (
            ["--resume", "job-1", "--seed", "0", "--fast", "--webhook", "http://h"],
            "--resume takes no --seed, --fast, --webhook, because the job has its own",
        ),
        (["--resume", "job-1", "--metadata", "a=b"], "--resume takes no --metadata,"),
        (["-", "--resume", "job-1"], "--resume takes no prompts"),
        (
            ["a", "--idempotency-key", "ä"],
            "invalid idempotency key: it must be 1 to 255 visible ASCII characters",
        ),
        (["a", "--guidance-scale", "nan"], "numbers must be finite"),
        (["a\udcff star"], "invalid UTF-8 in a string: "),
    ],
)
def test_errors_are_one_sentence(server: FakeServer, arguments: list[str], said: str) -> None:
    done = run("generate", *arguments)
    assert (done.exit_code, done.stderr.count("error:")) == (2, 1), done.output
    assert said in done.stderr
    assert server.bodies == []


@pytest.mark.parametrize("command", ["status", "models", "workers", "cancel job-1"])
@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("IMAGEMILL_API_KEY", "ä", "invalid API key (IMAGEMILL_API_KEY)"),
        ("IMAGEMILL_SERVER", "ht tp://x", "invalid server address"),
        ("IMAGEMILL_SERVER", "http://a..b", "invalid server address"),
        ("IMAGEMILL_SERVER", f"http://{'a' * 64}", "invalid server address"),
    ],
)
def test_invalid_variables_are_one_sentence(
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    variable: str,
    value: str,
    said: str,
) -> None:
    monkeypatch.setenv(variable, value)
    done = run(*command.split())
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
    assert said in done.stderr and value * 2 not in done.stderr
    assert isinstance(done.exception, SystemExit)


@pytest.mark.parametrize("proxy", ["nonsense://x", "::::"])
def test_an_invalid_proxy_is_one_sentence(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    done = run("status", "--server", "http://far.example")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
    assert "invalid proxy settings in the environment" in done.stderr


def test_a_file_as_data_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("keys", "list", "--data", tmp_path / "file")
    said = f"error: {tmp_path}/file/keys.json: Not a directory\n"
    assert (done.exit_code, done.stderr) == (1, said)


@pytest.mark.parametrize(
    ("pointer", "place"),
    [
        ("/reproducible", "--fast: "),
        ("/webhook/url", "--webhook: url "),
        ("/metadata", "--title and --metadata: "),
    ],
)
def test_a_refused_field_is_reported_by_its_flag(pointer: str, place: str) -> None:
    assert (
        _sentence(pointer, "is wrong", [])
        == f"{place}{'reproducible ' * ('fast' in place)}is wrong"
    )


def test_help_lists_the_exit_codes() -> None:
    said = " ".join(run("--help").output.split())
    assert "0 done, 1 something failed, 2 bad input, 3 already running, 130 stopped" in said


def test_every_command_and_flag_is_documented() -> None:
    import typer.main

    page = (Path(__file__).resolve().parents[2] / "docs" / "command.md").read_text()
    sections = re.split(r"^## ", page, flags=re.MULTILINE)
    top: Any = typer.main.get_command(app)
    for name, command in top.commands.items():
        inner = getattr(command, "commands", {"": command})
        for below, subcommand in inner.items():
            called = f"`imagemill {f'{name} {below}'.strip()}"
            about = "".join(part for part in sections if re.search(rf"{called}\b", part))
            assert about, called
            for flag in subcommand.params:
                if flag.param_type_name == "option" and not flag.hidden and flag.name != "help":
                    assert re.search(rf"`{flag.opts[0]}(?![\w-])", about), f"{name} {flag.opts}"
