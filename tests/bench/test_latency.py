"""Percentiles and shares on time, compared with values calculated by hand."""

import pytest

from bench.latency import percentile, print_summaries, summary


@pytest.mark.parametrize(("share", "figure"), [(0.5, 50), (0.95, 95), (0.99, 99), (0.001, 1)])
def test_percentiles_are_of_nearest_rank(share: float, figure: int) -> None:
    assert percentile(list(range(100, 0, -1)), share) == figure
    assert percentile([7], share) == 7


def test_a_summary_has_both_units_and_both_shares(capsys: pytest.CaptureFixture[str]) -> None:
    figures = summary([2.0, 4.0, 6.0, 8.0], [1.0, 3.0, 4.0, 5.0])
    assert figures == {
        "p50": 3.0,
        "p95": 5.0,
        "p99": 5.0,
        "p50_s": 4.0,
        "p95_s": 8.0,
        "p99_s": 8.0,
        "within_3x": 0.5,
        "within_4x": 0.75,
    }
    print_summaries("title", [("ours", figures)])
    assert "3.00    5.00    5.00   4.00/8.00/8.00" in capsys.readouterr().out
