"""The pages match the code: settings, routes, fields, statuses, commands, links."""

import importlib.util
import re
from pathlib import Path

import click
import pytest
import typer.main

from imagemill.cli import app as imagemill
from jobs.options import PLACEMENTS, RULES, serving
from jobs.runtime.settings import QueueSettings
from service.http.errors import STATUS
from service.openai.schemas import GenerateImages
from service.sdapi.schemas import TextToImage
from service.settings import ServiceSettings
from service.submit.schemas import ImageItem, JobView, ModelView, SubmitJob, Webhook
from tests.docs.pages import DOCKER, PAGES, ROOT, anchors, commands, links, variables
from workers.settings import WorkerSettings

API = (ROOT / "docs" / "api.md").read_text()
OPERATING = (ROOT / "docs" / "operating.md").read_text()
SETTINGS = {
    f"IMAGEMILL_{name.upper()}": field
    for kind in (QueueSettings, ServiceSettings, WorkerSettings)
    for name, field in kind.model_fields.items()
}
CLIENT_VARIABLES = {"IMAGEMILL_SERVER", "IMAGEMILL_API_KEY"}


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("name", list(SETTINGS))
def test_every_setting_has_a_row_with_its_default(name):
    [row] = re.findall(rf"^\| `{name}` \|.*$", OPERATING, re.MULTILINE)
    default = SETTINGS[name].default
    cell = row.split(" | ")[3]
    if default is None:
        assert cell.startswith(("unset", "the installed"))
    elif isinstance(default, bool):
        assert cell == str(default).lower()
    elif isinstance(default, int | float):
        assert cell.split()[0] == f"{default:g}" or cell.split()[0] == str(default)
    else:
        assert cell == f"`{default}`"


def test_the_table_of_options_and_placements_is_the_codes():
    text = (ROOT / "docs" / "models.md").read_text()
    header = f"| option | {' | '.join(f'`{name}`' for name in PLACEMENTS)} | otherwise |\n"
    rows = text.partition(header)[2].partition("\n\n")[0].splitlines()[1:]
    assert rows == [options_row(name) for name in dict.fromkeys(rule.option for rule in RULES)]


def options_row(name):
    rules = [rule for rule in RULES if rule.option == name]
    [placements] = [rule.placements for rule in rules if rule.placements]
    cells = ["yes" if placement in placements else "no" for placement in PLACEMENTS]
    otherwise = ""
    for rule in rules:
        if rule.stepped is not None:
            otherwise = f"only for models that are {serving(rule.stepped)}"
        elif rule.without:
            otherwise = f"can't be combined with {' or '.join(f'`{n}`' for n in rule.without)}"
        if otherwise and rule.why:
            otherwise += f": {rule.why}"
    return f"| `{name}` | {' | '.join(cells)} | {otherwise} |".replace("|  |", "| |")


@pytest.mark.parametrize("page", [*PAGES, *DOCKER], ids=page_name)
def test_every_variable_on_a_page_is_read(page):
    assert variables(page.read_text()) <= SETTINGS.keys() | CLIENT_VARIABLES


@pytest.mark.parametrize("name", sorted(CLIENT_VARIABLES))
def test_the_clients_variables_are_read(name):
    assert any(name in path.read_text() for path in (ROOT / "imagemill").rglob("*.py"))


def test_exactly_the_existing_routes_are_described(routes):
    described = set(re.findall(r"\b((?:GET|POST|PUT|PATCH|DELETE) /[^\s`]+)`", API))
    assert described == routes


@pytest.mark.parametrize(("status", "slug"), list(STATUS.values()))
def test_every_problem_is_described(status, slug):
    rows = re.findall(rf"^\| {status} \|.*$", API, re.MULTILINE)
    assert len(rows) == 1 and f"`{slug}`" in rows[0]


@pytest.mark.parametrize(
    "kind", [SubmitJob, Webhook, JobView, ImageItem, ModelView, GenerateImages, TextToImage]
)
def test_every_field_is_described(kind):
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`\n]+`", API))))
    assert not set(kind.model_fields) - words


def command_of(words: list[str]) -> click.Command:
    """The command that the words call, with its options."""
    command = typer.main.get_command(imagemill)
    for word in words:
        if not hasattr(command, "commands"):
            break
        if word.startswith("-"):
            break
        assert word in command.commands, f"imagemill has no {word}"
        command = command.commands[word]
    return command


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_and_their_flags_exist(page):
    for words in commands(page.read_text(), "imagemill"):
        known = {flag for option in command_of(words).params for flag in option.opts} | {"--help"}
        flags = {word.partition("=")[0] for word in words if word.startswith("-") and word != "-"}
        assert flags <= known, f"imagemill {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page.read_text(), "make"):
        assert {word for word in words if word.isidentifier()} <= targets


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_modules_in_commands_exist(page):
    for module in re.findall(r"python -m ([\w.]+)", page.read_text()):
        assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_link_targets_exist(page):
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target), f"{path}#{anchor}"


def test_exactly_the_existing_metrics_are_described(metrics):
    described = set(re.findall(r"`(imagemill_\w+)`", OPERATING))
    plain = {re.sub(r"_(bucket|sum|count)$", "", name) for name in metrics}
    assert described == plain


def test_the_family_page_describes_all_members():
    from ast import ClassDef, FunctionDef, parse, walk

    tree = parse((ROOT / "pipelines" / "families" / "family.py").read_text())
    [family] = [node for node in walk(tree) if isinstance(node, ClassDef) and node.name == "Family"]
    page = (ROOT / "docs" / "adding-a-family.md").read_text()
    for member in family.body:
        if isinstance(member, FunctionDef):
            assert re.search(rf"`{member.name}[`(]", page), member.name
