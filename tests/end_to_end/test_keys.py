"""A data folder with API keys: `up` still sees its workers, and callers need a key."""

from pathlib import Path

from tests.end_to_end.deployment import run, up
from tests.waiting import wait_until


def test_a_folder_with_keys_requires_one(tmp_path: Path) -> None:
    data = tmp_path / "data"
    key = run("keys", "add", "alice", "--data", data).stdout.strip()
    with up(data) as deployment:
        wait_until(lambda: "imagemill is ready" in deployment.said())
        assert "callers need one of 1 API key" in deployment.said()
        flags = ["a red circle", "--steps", "2", "--out", tmp_path, "--data", data]
        refused = run("generate", *flags)
        assert refused.returncode == 1
        assert "set IMAGEMILL_API_KEY" in refused.stderr
        accepted = run("generate", *flags, IMAGEMILL_API_KEY=key)
        assert accepted.returncode == 0, accepted.stderr
        again = run("replay", tmp_path / "0000-a-red-circle.png", "--data", data)
        assert again.returncode == 1
