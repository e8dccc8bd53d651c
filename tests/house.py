"""What `make check` asks of the tree that no linter does.

Modules and functions stay short, and so do lines of JavaScript. No module imports itself through
others, no sentence uses a phrase of PHRASES, and no test judges by the clock.

Run as a program from the repository's root; prints every breach and exits 1 if there is one.
"""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

MODULE_LINES = 400
COLUMNS = 100
FUNCTION_LINES = 60
PACKAGES = ("imagemill", "service", "workers", "pipelines", "jobs", "demo", "bench")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

PHRASES = re.compile(
    r"\b((?-i:is none)\b(?! of)|is no such|are to be had|is not to be had|nobody's|whoever"
    r"|how-manieth|lets go first|while they become|burning no|is no known|what is left of"
    r"|so many that)",
    re.IGNORECASE,
)
"""Phrases that no native speaker writes here; say it plainly."""


WAITS = {"wait", "join", "result", "communicate"}
CLOCKS = {"sleep", "time", "monotonic", "perf_counter", "process_time"}
REQUESTS = {"get", "post", "put", "patch", "delete", "head", "request", "stream"}
REQUESTS |= {"Client", "AsyncClient"}


def by_the_clock(path: Path, tree: ast.AST) -> list[str]:
    """Where a test would fail on a machine that is slow enough.

    A limit that only ends a hopeless wait is PATIENCE of tests/waiting.py. Tests wait with
    `wait_until`, read no clock, and send requests by tests/web.py. A short time that a test is
    about has a name that says so.
    """
    is_test = path.name.startswith("test_") or path.name == "conftest.py"
    found = []
    for node in ast.walk(tree):
        place = f"{path}:{getattr(node, 'lineno', 0)}"
        match node:
            case ast.Call(func=ast.Attribute(attr=name), args=[limit, *_]) if name in WAITS:
                if _is_short(limit):
                    found.append(f"{place}: {name} has a limit of its own, not PATIENCE")
            case ast.Attribute(value=ast.Name(id="time"), attr=name) if is_test and name in CLOCKS:
                found.append(f"{place}: a test uses time.{name}")
            case ast.ImportFrom(module="time") if is_test:
                found.append(f"{place}: a test uses time")
            case ast.Attribute(attr="elapsed") if is_test:
                found.append(f"{place}: a test looks at how long something took")
        if isinstance(node, ast.Call):
            found += [f"{place}: {wrong}" for wrong in _wrong_keywords(node)]
    return found


def _wrong_keywords(call: ast.Call) -> list[str]:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    wrong = []
    if _is_short(given.get("timeout")):
        wrong.append("timeout is a limit of its own, not PATIENCE")
    if "deadline" in given and not _is(given["deadline"], None):
        wrong.append("an example is judged by the clock")
    match call.func:
        case ast.Attribute(value=ast.Name(id="httpx"), attr=name) if name in REQUESTS:
            if not {"timeout", "transport", None} & given.keys():
                wrong.append(f"httpx.{name} gives up after five seconds; tests/web.py doesn't")
    return wrong


def _is_short(limit: ast.expr | None) -> bool:
    """Whether it is a number of seconds; 0 is a look, not a wait."""
    value = limit.value if isinstance(limit, ast.Constant) else None
    return isinstance(value, int | float) and value > 0


def _is(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def breaches(path: Path) -> list[str]:
    """What is too long in one Python module, and whether it opens with a docstring."""
    text = path.read_text()
    tree = ast.parse(text)
    found = []
    lines = text.count("\n")
    if lines > MODULE_LINES:
        found.append(f"{path}: {lines} lines, more than {MODULE_LINES}")
    if lines and ast.get_docstring(tree) is None:
        found.append(f"{path}: does not say at its top what it does")
    if path.parts[0] == "tests":
        found += by_the_clock(path, tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                found.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    return found


def cycles(paths: list[Path]) -> list[str]:
    """Modules that import each other at their top level, in rings of any length."""
    modules = {_module(path): path for path in paths if path.parts[0] in PACKAGES}
    imports = {name: _imported(path, modules) - {name} for name, path in modules.items()}
    try:
        list(TopologicalSorter(imports).static_order())
    except CycleError as error:
        return [f"import cycle: {' -> '.join(error.args[1])}"]
    return []


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _imported(path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of ours that a module imports when it's imported, or for type checkers."""
    found: set[str] = set()
    for statement in ast.parse(path.read_text()).body:
        for node in ast.walk(statement) if not isinstance(statement, FUNCTIONS) else ():
            if isinstance(node, ast.ImportFrom) and node.module:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (full & modules.keys()) or ({node.module} & modules.keys())
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names} & modules.keys()
    return found


def long_lines(path: Path) -> list[str]:
    """Lines that ruff's limit for Python would refuse, in a language whose linter has none."""
    lines = path.read_text().splitlines()
    return [
        f"{path}:{n}: more than {COLUMNS} columns"
        for n, line in enumerate(lines, 1)
        if len(line) > COLUMNS
    ]


def phrases(path: Path) -> list[str]:
    """Sentences in code, comments or docs that read as translated."""
    return [
        f"{path}:{number}: {match[0]!r} reads as translated"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := PHRASES.search(line))
    ]


def listed(*patterns: str) -> list[Path]:
    """Files that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [Path(line) for line in lines if Path(line).exists()]


def main() -> int:
    """Check the tree; print every breach."""
    modules = listed("*.py")
    found = [breach for path in modules for breach in breaches(path)]
    found += cycles(modules)
    found += [breach for path in listed("*.js") for breach in long_lines(path)]
    for path in listed("*.py", "*.md", "*.lua", "*.js", "*.html"):
        if path.name != "house.py":
            found += phrases(path)
    sys.stdout.write("".join(f"{breach}\n" for breach in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
