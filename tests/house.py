"""What `make check` asks of the tree that no linter does: the length of modules and functions.

Run as a program from the repository's root; prints every breach and exits 1 if there is one.
"""

import ast
import subprocess
import sys
from pathlib import Path

MODULE_LINES = 400
FUNCTION_LINES = 60


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
