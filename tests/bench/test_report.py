"""The output of a benchmark run, with benchmarks that only return figures."""

import json

import pytest

from bench.__main__ import main
from bench.report import Metrics
from bench.targets import TARGETS, verdicts


def _json(text: str) -> list[str]:
    return [json.loads(line)["bench"] for line in text.splitlines() if line.startswith("{")]


def _broken() -> Metrics:
    raise RuntimeError("the server is gone")


@pytest.mark.parametrize(
    ("name", "figure", "word"),
    [
        ("goodput_vs_fifo", 4.0, "reached"),
        ("goodput_vs_fifo", 3.999, "missed"),
        ("denoiser_idle", 0.05, "reached"),
        ("denoiser_idle", 0.051, "missed"),
        ("eta_miss", float("nan"), "missed"),
    ],
)
def test_a_figure_is_printed_with_its_target(name: str, figure: float, word: str) -> None:
    [line] = verdicts({"of no target": 1.0, name: figure})
    assert line.split()[0] == name
    assert str(TARGETS[name]) in line
    assert line.endswith(word)


def test_each_benchmark_is_printed_at_once_and_again_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = []

    def second() -> Metrics:
        seen.extend(_json(capsys.readouterr().out))
        return {"b": 2.0}

    assert main([], {"first": lambda: {"a": 1.0}, "second": second}) == 0
    assert seen == ["first"]
    assert _json(capsys.readouterr().out) == ["second", "first", "second"]


def test_a_benchmark_that_raises_does_not_stop_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([], {"broken": _broken, "sound": lambda: {"urgent": 2.0}}) == 1
    output = capsys.readouterr()
    assert "the server is gone" in output.err
    assert "failed: broken" in output.out
    assert _json(output.out) == ["sound", "sound"]
    assert output.out.splitlines()[-1].startswith("{")


def test_only_the_named_ones_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sound"], {"broken": _broken, "sound": lambda: {"a": 1.0}}) == 0
    assert main(["neither"], {"sound": lambda: {"a": 1.0}}) == 2
    assert "there are sound" in capsys.readouterr().err
