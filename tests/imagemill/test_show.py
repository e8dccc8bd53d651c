"""Tables and the panel of `up`, from plain values."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from imagemill import show
from imagemill.up import Ready, UpOptions
from jobs.catalog import load_catalog
from tests.end_to_end.mill import MODELS

MODEL = {
    "id": "demo",
    "placement": "replica",
    "dtype": "float32",
    "defaults": {"width": 128, "height": 128, "steps": 8},
    "limits": {"max_pixels": 65536, "max_steps": 100, "sizes": []},
    "ready_workers": 1,
    "queued": 3,
}
COSTS = [[256, 0.011], [512, 0.016], [1024, 0.03], [2048, 1.5]]


def said(renderable: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(renderable)
    return out.getvalue()


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (None, ("–", "–")),
        ({"family": "sd3"}, ("–", "–")),
        ({"costs": COSTS, "pinned": 4, "largest": 8}, ("4, at most 8", "30 ms")),
        ({"costs": COSTS, "pinned": 8, "largest": 8}, ("8, at most 8", "1.50 s")),
        ({"costs": COSTS, "pinned": 3, "largest": 8}, ("3, at most 8", "–")),
    ],
)
def test_what_warm_up_measured(card: dict[str, Any] | None, expected: tuple[str, str]) -> None:
    assert show.measured(card) == expected


def test_the_models_table_has_it() -> None:
    card = {"costs": COSTS, "pinned": 4, "largest": 8}
    row = said(show.models_table([{**MODEL, "card": card}])).splitlines()[1]
    assert "4, at most 8" in row and "30 ms" in row


@pytest.mark.parametrize(
    ("keys", "is_exposed", "expected", "other"),
    [
        (0, False, "Ctrl-C", "key"),
        (2, False, "callers need one of 2 API keys: set IMAGEMILL_API_KEY", "keys add"),
        (1, True, "over plain HTTP; callers need one of 1 API key", "Open to all"),
        (0, True, "whoever reaches this machine can use it", "plain HTTP"),
    ],
)
def test_the_panel_says_who_can_use_it(
    keys: int, is_exposed: bool, expected: str, other: str
) -> None:
    options = UpOptions("0.0.0.0", 8000, Path("elsewhere"), MODELS)
    worker = {"model": "demo", "state": "ready", "device": "cpu"}
    ready = Ready("http://h", options, load_catalog(MODELS), [worker], keys, is_exposed)
    text = said(show.ready_panel(ready))
    assert expected in text
    assert other not in text
    assert ("imagemill keys add NAME --data elsewhere" in text) == is_exposed
