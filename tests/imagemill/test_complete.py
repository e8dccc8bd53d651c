"""Completion in a real bash, with the script that `--show-completion` prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.imagemill.fake_server import FakeServer
from tests.imagemill.test_generate import run
from tests.waiting import PATIENCE

BASH = Path("/bin/bash")

TAB = """
eval "$(imagemill --show-completion bash)"
COMP_WORDS=({words}); COMP_CWORD={last}
_imagemill_completion imagemill
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def offered(*words: str, **variables: str) -> list[str]:
    """Bash's completions for these words, the last of which is incomplete or empty."""
    quoted = " ".join(f"'{word}'" for word in ("imagemill", *words))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [BASH, "--norc", "-c", TAB.format(words=quoted, last=len(words))],
        env={**os.environ, "PATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split()


@pytest.fixture
def no_server(tmp_path: Path) -> dict[str, str]:
    """An address without a server."""
    return {"IMAGEMILL_SERVER": "http://127.0.0.1:9"}


def test_commands_and_flags(no_server: dict[str, str]) -> None:
    assert offered("ge", **no_server) == ["generate"]
    assert "--watch" in offered("generate", "--w", **no_server)


def test_models_come_from_the_catalog_without_a_server(no_server: dict[str, str]) -> None:
    assert offered("generate", "--model", "d", **no_server) == ["demo"]


def test_jobs_come_from_the_server_only(
    no_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeServer() as fake:
        monkeypatch.setenv("IMAGEMILL_SERVER", fake.url)
        run("generate", "a", "--out", tmp_path)
        assert offered("status", "job-", IMAGEMILL_SERVER=fake.url) == ["job-1"]
        assert offered("generate", "--resume", "", IMAGEMILL_SERVER=fake.url) == ["job-1"]
    assert offered("cancel", "job-", **no_server) == []
