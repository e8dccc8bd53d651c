"""`imagemill keys` on a folder: what it makes is what the service lets in."""

import json
from pathlib import Path

import pytest

from service.keys import KeyRing
from tests.imagemill.test_generate import run


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def test_a_key_is_made_listed_and_revoked(tmp_path: Path) -> None:
    where = ["--data", tmp_path]
    flags = ["--weight", 2, "--max-unfinished", 50, "--max-priority", 4, "--rate", "60/minute"]
    made = run("keys", "add", "alice", *flags, *where)
    assert made.exit_code == 0, made.output
    shown = made.stdout.strip()
    assert "it is the first" in made.stderr
    known = KeyRing(tmp_path / "keys.json").find(shown)
    assert known is not None
    assert (known.tenant, known.weight, known.max_unfinished) == ("alice", 2.0, 50)
    assert (known.max_priority, known.rate) == (4, "60/minute")
    listed = run("keys", "list", *where).stdout
    assert known.id in listed and "60/minute" in listed and shown not in listed
    done = run("keys", "revoke", known.id, *where)
    assert "it was the last" in done.stderr
    assert KeyRing(tmp_path / "keys.json").find(shown) is None


def test_the_second_key_closes_nothing_more(tmp_path: Path) -> None:
    run("keys", "add", "alice", "--data", tmp_path)
    second = run("keys", "add", "bob", "--data", tmp_path, "--json")
    assert "it is the first" not in second.stderr
    assert json.loads(second.stdout)["tenant"] == "bob"
    found = json.loads(run("keys", "list", "--data", tmp_path, "--json").stdout)
    assert [key["tenant"] for key in found] == ["alice", "bob"]
    assert "sha256" not in found[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("add", "no spaces allowed"),
        ("add", "alice", "--weight", "0"),
        ("add", "alice", "--rate", "often"),
        ("revoke", "key_000000000000"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run("keys", *arguments, "--data", tmp_path)
    assert (done.exit_code, done.output.count("error:")) == (2, 1)


def test_no_keys_is_said(tmp_path: Path) -> None:
    assert "callers need none" in run("keys", "list", "--data", tmp_path).output


@pytest.mark.parametrize("command", [["keys"], ["keys", "add"], ["keys", "revoke"]])
def test_help(command: list[str]) -> None:
    assert "keys" in run(*command, "--help").output.lower()
