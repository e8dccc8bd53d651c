"""The tables and the panel of `up`."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from imagemill.client.models import Model, Worker
from imagemill.local.up import Ready, UpOptions
from imagemill.terminal import show
from jobs.catalog import load_catalog
from jobs.reports import Measured, ModelCard, WorkerReport
from tests.end_to_end.deployment import MODELS

MODEL = Model(
    id="demo",
    placement="replica",
    dtype="float32",
    defaults={"width": 128, "height": 128, "steps": 8},
    limits={"max_pixels": 65536, "max_steps": 100, "sizes": []},
    card=None,
    ready_workers=1,
    queued=3,
)
REST = ("queued", "running", "cancelled")
COSTS = ((256, 0.011), (512, 0.016), (1024, 0.03), (2048, 1.5))


JOB = {
    "id": "660ce0703dbfb38aa064462",
    "state": "running",
    "model": "demo",
    "progress": 0.37,
    "counts": {"total": 180, "succeeded": 60, "failed": 2, **dict.fromkeys(REST, 0)},
    "created": 1.75e9,
    "metadata": {"title": "Hearts\x1b[2J of\nmany colours, for the wall of the long corridor"},
}


def said(renderable: Any, width: int = 160) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(renderable)
    return out.getvalue()


def test_a_jobs_warnings_are_shown() -> None:
    warnings = ["no worker of model 'demo' can start: \x1b[2Jthe file is missing"]
    text = said(show.job_facts({**JOB, "warnings": warnings}))
    assert "warning" in text and "can start:" in text and "the file is missing" in text
    assert "\x1b" not in text
    assert "warning" not in said(show.job_facts({**JOB, "warnings": []}))


def test_the_jobs_table_has_one_line_per_job() -> None:
    lines = said(show.jobs_table([JOB, {**JOB, "metadata": {}}]), 80).splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 80
    assert "Hear" in lines[1] and "demo" in lines[1] and "2025-06-1" in lines[1]
    assert "running 37%" in lines[1] and "60/180, 2 failed" in lines[1]


def test_titles_and_prompts_print_no_escape_sequences() -> None:
    image = {"index": 0, "state": "failed", "seed": 7, "prompt": "a\x1b[2Jb", "error": "\x1b[H"}
    tables = [show.jobs_table([JOB]), show.job_facts(JOB), show.results_table([image])]
    text = "".join(map(said, tables))
    assert "Hearts\N{REPLACEMENT CHARACTER}[2J of many colours" in text
    assert "a\N{REPLACEMENT CHARACTER}[2Jb" in text and "\x1b" not in text


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ({}, ""),
        ({"metadata": None}, ""),
        ({"metadata": {"title": 7}}, ""),
        ({"metadata": {"title": " a\n b "}}, "a b"),
    ],
)
def test_a_jobs_title(job: dict[str, Any], expected: str) -> None:
    assert show.title_of(job) == expected


@pytest.mark.parametrize(
    ("warm_up", "expected"),
    [
        (None, ("–", "–")),
        (Measured((), 1, 1), ("–", "–")),
        (Measured(COSTS, 4, 8), ("4, at most 8", "30 ms")),
        (Measured(COSTS, 8, 8), ("8, at most 8", "1.50 s")),
        (Measured(COSTS, 3, 8), ("3, at most 8", "–")),
    ],
)
def test_measurements_of_warm_up(warm_up: Measured | None, expected: tuple[str, str]) -> None:
    assert show.measured(warm_up) == expected


def test_the_models_table_has_measurements() -> None:
    model = replace(MODEL, card=ModelCard(measured=Measured(COSTS, 4, 8)).to_dict())
    row = said(show.models_table([model])).splitlines()[1]
    assert "4, at most 8" in row and "30 ms" in row


@pytest.mark.parametrize(
    ("keys", "is_exposed", "expected", "other"),
    [
        (0, False, "Ctrl-C", "key"),
        (2, False, "callers need one of 2 API keys: set IMAGEMILL_API_KEY", "keys add"),
        (1, True, "over plain HTTP; callers need one of 1 API key", "Open to all"),
        (0, True, "anyone who can reach this machine can use it", "plain HTTP"),
    ],
)
def test_the_panel_says_who_has_access(
    keys: int, is_exposed: bool, expected: str, other: str
) -> None:
    options = UpOptions("0.0.0.0", 8000, Path("elsewhere"), MODELS)
    worker = WorkerReport("demo", "ready", device="cpu")
    ready = Ready("http://h", options, load_catalog(MODELS), [worker], keys, is_exposed)
    text = said(show.ready_panel(ready))
    assert expected in text
    assert other not in text
    assert ("imagemill keys add NAME --data elsewhere" in text) == is_exposed


LONG = "a-model-name-of-as-many-characters-as-are-likely-to-occur-v2"
ENTRY = replace(MODEL, card=ModelCard(measured=Measured(COSTS, 4, 8)).to_dict())
WORKER = Worker.parse(
    {"id": "w", "model": LONG, "state": "failed", "device": "cuda:0", "host": "node-17", "pid": 12}
    | {"in_flight": 3, "images_done": 1200, "steps_per_second": 12.3, "error": "no file " * 9}
)
KEY = {
    "id": "key-660ce0703dbfb38aa06",
    "tenant": LONG,
    "created": 1.75e9,
    "weight": 1.0,
    "max_unfinished": 1000,
    "max_priority": 9,
    "rate": "600/minute",
}
IMAGE = {
    "index": 0,
    "state": "succeeded",
    "seed": 2**53 - 1,
    "prompt": "a red circle",
    "error": None,
    "file": "0000-a-large-red-circle-on-a-blue-background.png",
}


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize(
    ("table", "names"),
    [
        (show.models_table([ENTRY, replace(MODEL, id=LONG)]), ["demo", LONG, "4, at most 8"]),
        (show.jobs_table([JOB]), [JOB["id"], "running 37%", "60/180, 2 failed", "demo"]),
        (show.jobs_table([{**JOB, "model": LONG}]), [JOB["id"], LONG]),
        (show.workers_table([WORKER]), [LONG, "cuda:0", "node-17", "12.3", "no file"]),
        (show.keys_table([KEY]), [KEY["id"], LONG, "600/minute", "1000"]),
        (show.results_table([IMAGE]), [str(2**53 - 1), IMAGE["file"]]),
    ],
    ids=["models", "jobs", "jobs of a long model", "workers", "keys", "images"],
)
def test_no_name_is_cut_at_any_width(width: int, table: Any, names: list[str]) -> None:
    """Names may wrap where one is as wide as the terminal, but all of their letters are there."""
    lines = said(table, width).splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(lines)
    letters = "".join(text.split())
    for name in names:
        assert name in text or "".join(name.split()) in letters, (name, text)
    assert "model-na…" not in text


def test_a_file_name_that_wraps_is_complete() -> None:
    lines = said(show.results_table([IMAGE]), 60).splitlines()[1:]
    column = lines[0].index("0000-a")
    assert "".join(line[column:].strip() for line in lines) == IMAGE["file"]
