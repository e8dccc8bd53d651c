"""`imagemill keys` creates keys that the service accepts."""

import json
from pathlib import Path

import pytest

from service.keys import KeyRing
from tests.imagemill.test_generate import run


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def test_a_key_is_created_listed_and_revoked(tmp_path: Path) -> None:
    where = ["--data", tmp_path]
    flags = ["--weight", 2, "--max-unfinished", 50, "--max-priority", 4, "--rate", "60/minute"]
    added = run("keys", "add", "alice", *flags, *where)
    assert added.exit_code == 0, added.output
    secret = added.stdout.strip()
    assert "this is the first key" in added.stderr
    known = KeyRing(tmp_path / "keys.json").find(secret)
    assert known is not None
    assert (known.tenant, known.weight, known.max_unfinished) == ("alice", 2.0, 50)
    assert (known.max_priority, known.rate) == (4, "60/minute")
    listed = run("keys", "list", *where).stdout
    assert known.id in listed and "60/minute" in listed and secret not in listed
    done = run("keys", "revoke", known.id, *where)
    assert "that was the last key" in done.stderr
    assert KeyRing(tmp_path / "keys.json").find(secret) is None


def test_only_the_first_key_prints_the_warning(tmp_path: Path) -> None:
    run("keys", "add", "alice", "--data", tmp_path)
    second = run("keys", "add", "bob", "--data", tmp_path, "--json")
    assert "this is the first key" not in second.stderr
    assert json.loads(second.stdout)["tenant"] == "bob"
    found = json.loads(run("keys", "list", "--data", tmp_path, "--json").stdout)
    assert [key["tenant"] for key in found] == ["alice", "bob"]
    assert "sha256" not in found[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("add", "no spaces allowed"),
        ("add", "a/b"),
        ("add", "alice", "--weight", "0"),
        ("add", "alice", "--rate", "often"),
        ("revoke", "key_000000000000"),
    ],
)
def test_errors_are_one_sentence(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run("keys", *arguments, "--data", tmp_path)
    assert (done.exit_code, done.output.count("error:")) == (2, 1)


def test_no_keys(tmp_path: Path) -> None:
    assert "none is required" in run("keys", "list", "--data", tmp_path).output


@pytest.mark.parametrize("command", [["keys"], ["keys", "add"], ["keys", "revoke"]])
def test_help(command: list[str]) -> None:
    assert "keys" in run(*command, "--help").output.lower()
