"""Reports and cards as JSON: exactly what's written, and what other releases wrote."""

from dataclasses import replace

import pytest

from jobs.reports import (
    Buckets,
    Card,
    Histogram,
    Measured,
    ModelCard,
    PromptForm,
    RankProcess,
    WorkerReport,
)

COUNTS = {"buckets": [[1, 2], [None, 3]], "sum": 5}
READY = {
    "model": "demo",
    "state": "ready",
    "error": None,
    "pid": 7,
    "host": "here",
    "device": "cpu",
    "placement": "replica",
    "ranks": 1,
    "group": [{"rank": 0, "pid": 7, "device": "cpu"}],
    "started": 1.5,
    "in_flight": 3,
    "images_done": 4,
    "steps_per_second": None,
    "forwards": 5,
    "steps": 6,
    "at": 2.5,
    "busy_seconds": 0.5,
    "held_pixel_steps": 100,
    "memory": {},
    "pixel_steps_per_second": None,
    "samples_per_forward": None,
    "tokens": 9,
    "forward_samples": COUNTS,
    "forward_seconds": COUNTS,
    "prompt_cache": {"hits": 1, "misses": 2},
    "buckets": {"pinned": 2, "largest": 4},
}
"""What a ready worker wrote in 0.1."""

CARD = {
    "family": "flux",
    "multiple": 16,
    "guidance": "embedded",
    "joins": True,
    "max_prompt_tokens": 77,
    "scheduler": "Euler",
    "prompt": {"before": "", "after": "", "lowered": True, "dropped": 1, "removed": ""},
    "guides_above": 1.0,
    "sizes": [[64, 32]],
    "costs": [[64, 0.5], [128, 0.75]],
    "pinned": 2,
    "largest": 4,
    "image_tokens_per_pixel": 0.25,
    "source": "owner/name@main",
    "defaults": {"steps": 4},
}


def test_a_ready_workers_report_has_the_same_keys_as_ever() -> None:
    report = WorkerReport.from_dict(READY)
    assert report.to_dict() == READY
    assert report.group == (RankProcess(0, 7, "cpu"),)
    assert report.forward_samples == Histogram(((1, 2), (None, 3)), 5)
    assert report.buckets == Buckets(2, 4)
    assert report.ready and not report.failed


def test_reports_of_other_releases_are_read() -> None:
    assert WorkerReport.from_dict({}) == WorkerReport(state="unknown")
    later = {**READY, "colour": "red", "buckets": {"pinned": 1, "largest": 2, "shape": "round"}}
    report = WorkerReport.from_dict(later)
    assert report == replace(WorkerReport.from_dict(READY), buckets=Buckets(1, 2))
    assert "colour" not in report.to_dict()


def test_unknown_values_are_left_out_of_a_report() -> None:
    written = WorkerReport("demo", "failed", "no room").to_dict()
    assert {name: value for name, value in written.items() if value is not None} == {
        "model": "demo",
        "state": "failed",
        "error": "no room",
    }
    assert "in_flight" not in written


def test_a_card_has_the_same_keys_as_ever() -> None:
    card = ModelCard.from_dict(CARD)
    assert card.to_dict() == CARD
    form = PromptForm(lowered=True, dropped=1)
    sizes = ((64, 32),)
    assert card.properties == Card("flux", 16, "embedded", True, 77, "Euler", form, 1.0, sizes)
    assert card.measured == Measured(((64, 0.5), (128, 0.75)), 2, 4, 0.25)


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        ((), ModelCard.from_dict(CARD)),
        (("image_tokens_per_pixel",), None),
        (("family",), replace(ModelCard.from_dict(CARD), properties=None)),
        (("pinned",), replace(ModelCard.from_dict(CARD), measured=None)),
    ],
)
def test_cards_of_other_releases_are_read(
    gone: tuple[str, ...], expected: ModelCard | None
) -> None:
    written = {name: value for name, value in CARD.items() if name not in gone}
    card = ModelCard.from_dict({**written, "colour": "red"})
    if expected is None:
        assert card.measured == Measured(((64, 0.5), (128, 0.75)), 2, 4, None)
    else:
        assert card == expected
    assert ModelCard.from_dict({}) == ModelCard()
