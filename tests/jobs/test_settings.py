"""Settings come from the environment and are validated."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from jobs.errors import ConfigurationError
from jobs.runtime.settings import QueueSettings
from service.settings import ServiceSettings
from workers.settings import WorkerSettings


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEMILL_DATA", "/srv/mill")
    monkeypatch.setenv("IMAGEMILL_LEASE_SECONDS", "2.5")
    settings = QueueSettings.read(pool="p1")
    assert (settings.data, settings.lease_seconds) == (Path("/srv/mill"), 2.5)
    assert (settings.pool, settings.redis_url) == ("p1", None)


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEMILL_DATA", "/srv/mill")
    assert QueueSettings.read(data=Path("/other")).data == Path("/other")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LEASE_SECONDS", "0"),
        ("LEASE_SECONDS", "soon"),
        ("POOL", "a{b}"),
        ("MAX_UNFINISHED", "0"),
        ("LEASE_SECONDS", "inf"),
        ("LEASE_SECONDS", "nan"),
        ("LEASE_SECONDS", "1e12"),
        ("KEEP_SECONDS", "0"),
        ("KEEP_SECONDS", "1000000000000"),
        ("MAX_STALLS", "-1"),
        ("MAX_ATTEMPTS", "0"),
        ("LOG", "xml"),
        ("THREADS", "-3"),
        ("THREADS", "0"),
        ("DRAIN_SECONDS", "-1"),
        ("DRAIN_SECONDS", "nan"),
        ("DRAIN_SECONDS", "1e12"),
        ("STUCK_SECONDS", "-1"),
        ("STUCK_SECONDS", "0"),
        ("STUCK_SECONDS", "inf"),
        ("LINGER_SECONDS", "-1"),
        ("LINGER_SECONDS", "inf"),
    ],
)
def test_an_invalid_value_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"IMAGEMILL_{name}", value)
    with pytest.raises(ConfigurationError, match=f"IMAGEMILL_{name}"):
        WorkerSettings.read()


def test_the_services_settings_are_finite_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEMILL_SYNC_SECONDS", "inf")
    with pytest.raises(ConfigurationError, match="IMAGEMILL_SYNC_SECONDS"):
        ServiceSettings.read()


def test_every_number_has_its_bounds() -> None:
    """This fails for a new setting without bounds."""
    schema = WorkerSettings.model_json_schema()["properties"]
    for name, field in schema.items():
        if field.get("type") in ("number", "integer"):
            assert {"minimum", "exclusiveMinimum"} & field.keys(), name
            assert "maximum" in field or not name.endswith("_seconds"), name


def test_some_times_may_be_zero() -> None:
    assert WorkerSettings.read(linger_seconds=0, drain_seconds=0, max_stalls=0).drain_seconds == 0


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        QueueSettings.read().pool = "other"  # type: ignore[misc]


@pytest.mark.parametrize("module", ["workers", "service"])
def test_an_unusable_data_folder_is_a_one_line_error(module: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    process = subprocess.run(
        [sys.executable, "-m", module],
        env={**os.environ, "IMAGEMILL_DATA": str(tmp_path / "file" / "data")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert "IMAGEMILL_DATA" in process.stderr
    assert process.stderr.count("\n") == 1
