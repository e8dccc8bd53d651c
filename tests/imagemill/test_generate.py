"""`imagemill generate` against a fake server: files, exit codes, messages, resuming."""

import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from imagemill.cli import app
from imagemill.client import protocol
from imagemill.client.clients import Client
from imagemill.client.file_names import sha256_of
from imagemill.commands import follow
from imagemill.local.find_server import why_not_ready
from imagemill.terminal.sheet import MARK
from tests.imagemill.fake_server import FakeServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(protocol, "POLL_PAUSE", 0.001)
    monkeypatch.setenv("COLUMNS", "100")
    with FakeServer() as fake:
        monkeypatch.setenv("IMAGEMILL_SERVER", fake.url)
        yield fake


def run(*arguments: str | Path, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def test_every_prompt_becomes_a_file_and_a_tile_of_the_sheet(
    server: FakeServer, tmp_path: Path
) -> None:
    done = run("generate", "a red circle", "a blue heart", "--out", tmp_path / "out", "--steps", 4)
    assert done.exit_code == 0, done.output
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["0000-a-red-circle.png", "0001-a-blue-heart.png", "sheet.png"]
    assert server.bodies[0] == {
        "model": "demo",
        "prompts": ["a red circle", "a blue heart"],
        "steps": 4,
        "metadata": {"title": "a red circle"},
    }
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > 2 * 176
    assert "2 of 2 images" in done.output
    assert "0001-a-blue-heart.png" in done.output


def test_warnings_of_images_are_printed_unless_they_were_at_the_start(
    server: FakeServer, tmp_path: Path
) -> None:
    cut, dark = "the model reads 3 tokens of a prompt and cuts the rest", "it is dark"
    server.notes = [f"{cut}: /prompts/0"]
    server.warnings = {"one two three four": [cut, dark], "a": [dark], "b": []}
    done = run("generate", *server.warnings, "--out", tmp_path)
    notes = [line for line in unwrapped(done.output) if line.startswith("note: ")]
    assert notes == [f"note: {cut}: /prompts/0", f"note: {dark}: image 0, 1"]
    document = json.loads(run("generate", "a", "--out", tmp_path, "--json").stdout)
    assert document["images"][0]["warnings"] == [dark]
    status = run("status", "job-2").output
    assert f"took 0.5 s, {dark}" in status


def unwrapped(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()]


def test_all_flags_reach_the_server(server: FakeServer, tmp_path: Path) -> None:
    given = {
        "model": "demo",
        "width": 64,
        "height": 32,
        "guidance_scale": 2.5,
        "negative_prompt": "fog",
        "seed": 3,
        "n": 2,
        "priority": 9,
        "format": "webp",
    }
    flags = ["--idempotency-key", "mine", "--title", "Fog"]
    for name, value in given.items():
        flags += ["--" + name.replace("_", "-"), str(value)]
    assert run("generate", "a", *flags, "--out", tmp_path).exit_code == 0
    assert server.bodies[0] == {"prompts": ["a"], "metadata": {"title": "Fog"}, **given}
    assert list(server.keys) == ["mine"]


def test_prompts_from_a_file_and_from_standard_input(server: FakeServer, tmp_path: Path) -> None:
    assert run("generate", "-f", "-", "-o", tmp_path, stdin="one\ntwo\n").exit_code == 0
    (tmp_path / "p.jsonl").write_text('{"prompt": "three", "seed": 3}\n')
    assert run("generate", "-f", tmp_path / "p.jsonl", "-o", tmp_path).exit_code == 0
    assert [body["prompts"] for body in server.bodies] == [
        ["one", "two"],
        [{"prompt": "three", "seed": 3}],
    ]


@pytest.mark.parametrize("words", [["-f", "-"], ["-"]])
def test_csv_from_standard_input(server: FakeServer, tmp_path: Path, words: list[str]) -> None:
    table = "prompt,seed\na red star,5\nb,\n"
    done = run("generate", *words, "-o", tmp_path, stdin=table)
    assert done.exit_code == 0, done.output
    assert server.bodies[0]["prompts"] == [{"prompt": "a red star", "seed": 5}, "b"]
    assert server.bodies[0]["metadata"] == {"title": "a red star"}
    assert len(list(tmp_path.glob("000?-*.png"))) == 2


def test_the_default_title_is_the_file_name_or_the_first_prompt(
    server: FakeServer, tmp_path: Path
) -> None:
    file = tmp_path / "colours.txt"
    file.write_text("blue\n")
    long = "very " * 40
    run("generate", "red", "-f", file, "-o", tmp_path)
    run("generate", "-f", "-", "-o", tmp_path, stdin=f"{long}\nred\n")
    run("generate", "red", "--title", "", "-o", tmp_path)
    titles = [body.get("metadata") for body in server.bodies]
    assert titles == [{"title": "colours.txt"}, {"title": long[:80]}, None]
    assert "colours.txt" in run("status").output
    assert "colours.txt" in run("status", "job-1").output


def test_a_failed_image_fails_the_command_but_not_other_images(
    server: FakeServer, tmp_path: Path
) -> None:
    server.fails = {"bad"}
    done = run("generate", "good", "bad", "--out", tmp_path)
    assert done.exit_code == 1
    assert "the latents are not numbers" in done.output
    assert (tmp_path / "0000-good.png").exists()
    assert f"imagemill generate --resume job-1 --out {tmp_path}" in done.output.replace("\n", "")


def test_resume_generates_and_downloads_only_missing_images(
    server: FakeServer, tmp_path: Path
) -> None:
    server.fails = {"bad"}
    run("generate", "good", "bad", "lost", "--out", tmp_path)
    good, lost = tmp_path / "0000-good.png", tmp_path / "0002-lost.png"
    before = good.stat().st_mtime_ns
    lost.unlink()
    server.fails = set()
    server.calls.clear()
    done = run("generate", "--resume", "job-1", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert server.calls["POST /v1/jobs/ID/retry"] == 1
    assert "POST /v1/jobs" not in server.calls
    assert [name for name in server.calls if "/images/" in name] == [
        "GET /v1/jobs/ID/images/2",
        "GET /v1/jobs/ID/images/1",
    ]
    assert good.stat().st_mtime_ns == before
    assert lost.exists()
    assert "1 already downloaded" in done.output


def test_images_of_another_job_are_not_overwritten(server: FakeServer, tmp_path: Path) -> None:
    run("generate", "a", "--out", tmp_path)
    kept = sha256_of(tmp_path / "0000-a.png")
    server.keys.clear()
    server.jobs["job-1"]["images"][0]["seed"] = 99
    server.jobs["job-1"]["images"][0]["sha256"] = None
    server.jobs["job-1"]["images"][0]["state"] = "queued"
    assert run("generate", "--resume", "job-1", "--out", tmp_path).exit_code == 0
    assert sha256_of(tmp_path / "0000-a.png") == kept
    assert (tmp_path / "0000-a-2.png").exists()


def test_only_our_own_contact_sheet_is_overwritten(server: FakeServer, tmp_path: Path) -> None:
    mine = tmp_path / "sheet.png"
    Image.new("RGB", (8, 8)).save(mine)
    kept = mine.read_bytes()
    (tmp_path / "sheet-2.png").write_text("not a picture")
    (tmp_path / "sheet-3.png").symlink_to("nowhere")
    (tmp_path / "sheet-4.png").mkdir()
    done = run("generate", "a", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "overview in" in done.output and "sheet-5.png" in done.output
    assert mine.read_bytes() == kept
    document = json.loads(run("generate", "--resume", "job-1", "--out", tmp_path, "--json").stdout)
    assert document["sheet"] == str(tmp_path / "sheet-5.png")
    with Image.open(document["sheet"]) as sheet:
        sheet.load()
        text = PngInfo()
        text.add_text(MARK, sheet.text[MARK])
        sheet.putpixel((0, 0), (1, 2, 3))
        sheet.save(document["sheet"], pnginfo=text)
    edited = Path(document["sheet"]).read_bytes()
    document = json.loads(run("generate", "--resume", "job-1", "--out", tmp_path, "--json").stdout)
    assert document["sheet"] == str(tmp_path / "sheet-6.png")
    assert (tmp_path / "sheet-5.png").read_bytes() == edited


def test_a_write_error_is_one_sentence(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    done = run("generate", "a", "--out", tmp_path)
    assert done.exit_code == 1
    assert done.stderr == f"error: couldn't write {tmp_path}/0000-a.png: No space left on device\n"
    assert "to resume: imagemill generate --resume job-1" in done.stdout
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    done = run("generate", "a", "--out", tmp_path / "file" / "out")
    assert (done.exit_code, "Not a directory" in done.stderr) == (2, True)


def test_json_is_one_document_on_stdout(server: FakeServer, tmp_path: Path) -> None:
    server.fails = {"bad"}
    done = run("generate", "good", "bad", "--out", tmp_path, "--json")
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert document["counts"]["failed"] == 1
    assert document["images"][0]["file"] == "0000-good.png"
    assert document["images"][1]["error"] == "the latents are not numbers"
    assert document["resume"].startswith("imagemill generate --resume job-1")
    assert "job job-1" in done.stderr


def test_bad_input_names_its_place(server: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt,width\na,32\nb,33\n")
    done = run("generate", "-f", path, "--out", tmp_path)
    assert done.exit_code == 2
    assert done.stderr == f"error: {path} line 3: width must be a multiple of 16\n"
    done = run("generate", "-f", tmp_path / "none.txt")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no prompts"),
        (["a", "--resume", "job-1"], "--resume takes no prompts"),
        (
            ["--resume", "job-1", "--steps", "4", "--title", "T"],
            "--resume takes no --steps, --title, because the job has its own",
        ),
        (["a", "--pictures", "all"], "'all' is not one of"),
    ],
)
def test_contradictory_flags_are_refused(
    server: FakeServer, arguments: list[str], said: str, tmp_path: Path
) -> None:
    done = run("generate", *arguments, "--out", tmp_path)
    assert done.exit_code == 2
    assert said in done.stderr


def test_an_unknown_job_is_one_sentence(server: FakeServer, tmp_path: Path) -> None:
    done = run("generate", "--resume", "job-9", "--out", tmp_path)
    assert done.exit_code == 1
    assert "nothing at /v1/jobs/job-9" in done.stderr
    assert "Traceback" not in done.output


def test_an_unreachable_server_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(protocol, "FIRST_DELAY", 100.0)
    monkeypatch.setattr(protocol, "LONGEST_DELAY", 100.0)
    done = run("models", "--server", "http://127.0.0.1:9")
    assert done.exit_code == 1
    assert "couldn't reach an imagemill server at http://127.0.0.1:9" in done.stderr
    assert "Errno" not in done.stderr
    done = run("generate", "a", "--out", tmp_path, "--server", "http://127.0.0.1:9")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    done = run("status", "--data", tmp_path)
    assert (
        f"no server is running on the data folder {tmp_path}; start one with `imagemill up`"
        in done.stderr
    )


def test_a_short_outage_is_reported_and_waited_for(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poll = protocol.poll

    def poll_of_a_busy_server(*arguments: Any, **flags: Any) -> Any:
        monkeypatch.setattr(follow.protocol, "poll", poll)
        server.script += [(503, {"Retry-After": "0"}), (502, {"Retry-After": "0"})]
        return poll(*arguments, **flags)

    monkeypatch.setattr(follow.protocol, "poll", poll_of_a_busy_server)
    done = run("generate", "a", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert done.output.count("waiting for the server") == 1


def test_a_user_without_workers_is_told_where_to_look(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "LOOK_AT_WORKERS", 0.0)
    monkeypatch.setattr(follow, "LONELY_SECONDS", 0.0)
    server.workers = []
    done = run("generate", "a", "b", "--out", tmp_path)
    assert done.exit_code == 0
    assert "no worker has reported for 0 s; start one with `imagemill worker`" in done.output


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        ([], ("waiting for a worker", False)),
        ([("other", "ready", 9)], ("waiting for a worker", False)),
        ([("demo", "starting", 9)], ("loading the model", False)),
        ([("demo", "ready", 1), ("demo", "failed", 9)], ("waiting for its turn", False)),
        ([("demo", "failed", 1), ("demo", "starting", 9)], ("loading the model", False)),
        (
            [("demo", "failed", 9), ("demo", "starting", 10)],
            ("couldn't load the model: no file", True),
        ),
    ],
)
def test_why_not_ready(
    server: FakeServer, workers: list[tuple[str, str, float]], expected: tuple[str, bool]
) -> None:
    """Failures before time 5 may have been fixed; later ones are final."""
    server.workers = [
        {"id": str(i), "model": model, "state": state, "started": started, "error": "no file"}
        for i, (model, state, started) in enumerate(workers)
    ]
    with Client(server.url) as client:
        assert why_not_ready(client, "demo", 5.0) == expected


def test_a_recently_reported_failure_is_final(server: FakeServer) -> None:
    """Even if the worker started long ago."""
    failed = {"id": "1", "model": "demo", "state": "failed", "started": 1, "error": "no file"}
    with Client(server.url) as client:
        server.workers = [failed | {"at": 4}]
        assert why_not_ready(client, "demo", 5.0) == ("waiting for a worker", False)
        server.workers = [failed | {"at": 6}]
        assert why_not_ready(client, "demo", 5.0) == ("couldn't load the model: no file", True)


def test_ctrl_c_cancels_and_prints_how_to_resume(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal arrives after the first image; a second run then finishes the job."""
    poll = protocol.poll

    def poll_until_one_is_made(*arguments: Any, **flags: Any) -> Any:
        if server.jobs["job-1"]["counts"]["succeeded"] == 1 and not server.holds:
            server.holds = True
            os.kill(os.getpid(), signal.SIGINT)
        return poll(*arguments, **flags)

    monkeypatch.setattr(follow.protocol, "poll", poll_until_one_is_made)
    done = run("generate", "a", "b", "c", "--out", tmp_path)
    assert done.exit_code == 130
    assert server.calls["POST /v1/jobs/ID/cancel"] == 1
    assert (tmp_path / "0000-a.png").exists()
    command = f"imagemill generate --resume job-1 --out {tmp_path}"
    assert done.output.replace("\n", "").count(command) == 1
    server.holds = False
    monkeypatch.setattr(follow.protocol, "poll", poll)
    done = run("generate", "--resume", "job-1", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert len(list(tmp_path.glob("000?-*.png"))) == 3
    assert server.calls["GET /v1/jobs/ID/images/0"] == 1


def test_status_models_workers_and_cancel(server: FakeServer, tmp_path: Path) -> None:
    run("generate", "a red circle", "--out", tmp_path)
    assert "1/1" in run("status").output
    assert "a red circle" in run("status", "job-1").output
    assert json.loads(run("status", "job-1", "--json").stdout)["state"] == "succeeded"
    assert json.loads(run("models", "--json").stdout) == [{"id": "demo"}]
    assert "ready" in run("workers").output
    assert "1 of 1 images finished" in run("cancel", "job-1").output
    assert run("cancel", "job-9").exit_code == 1
