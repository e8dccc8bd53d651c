"""What `make check` asks of the tree that no linter does: the length of modules and functions, and
that no test judges by the clock.

Run as a program from the repository's root; prints every breach and exits 1 if there is one.
"""

import ast
import subprocess
import sys
from pathlib import Path

MODULE_LINES = 400
FUNCTION_LINES = 60


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


def main() -> int:
    """Check every Python file that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [Path(line) for line in listed.stdout.splitlines() if Path(line).exists()]
    found = [breach for path in paths for breach in breaches(path)]
    sys.stdout.write("".join(f"{breach}\n" for breach in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
