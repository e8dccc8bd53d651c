"""Lints the queue's Lua scripts with luacheck, as `make check` does.

The scripts share the functions of some files that are prepended to each of them. So luacheck gets
all of them as one chunk, where it also finds shared functions that no script uses. Each warning is
printed with its own file and line. luacheck isn't on PyPI: without it this prints how to get it,
and fails only where CI is set.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from jobs.queue.connection import SHARED
from jobs.queue.keys import lua_tables

FOLDER = Path("jobs/queue/lua")
OPTIONS = ("--std", "lua51", "--read-globals", "KEYS", "ARGV", "redis", "cjson", "--no-self")
OPTIONS += ("--max-line-length", "100", "--formatter", "plain", "-")
WARNING = re.compile(r"stdin:(\d+):(.*)")


def chunk() -> list[tuple[str, str]]:
    """All lines to lint, each with its place: the shared files, then a function per script."""
    shared = [FOLDER / f"{name}.lua" for name in SHARED]
    scripts = [path for path in sorted(FOLDER.glob("*.lua")) if path not in shared]
    tables = [f"{line} -- luacheck: ignore 631" for line in lua_tables().splitlines()]  # long lines
    lines = [("lua_tables() in jobs/queue/keys.py", line) for line in tables]
    for path in shared:
        lines += _lines(path)
    for path in scripts:
        lines += [(str(path), ";(function()"), *_lines(path), (str(path), "end)()")]
    return lines


def _lines(path: Path) -> list[tuple[str, str]]:
    text = path.read_text(encoding="utf-8")
    return [(f"{path}:{number}", line) for number, line in enumerate(text.splitlines(), 1)]


def main() -> int:
    """Print every warning; returns the exit status."""
    if shutil.which("luacheck") is None:
        sys.stderr.write(
            "Lua isn't linted: luacheck not found (apt-get install lua-check, brew install "
            "luacheck, or luarocks install luacheck)\n"
        )
        return 1 if os.environ.get("CI") else 0
    lines = chunk()
    text = "\n".join(line for _, line in lines)
    done = subprocess.run(["luacheck", *OPTIONS], input=text, capture_output=True, text=True)
    for line in (done.stdout + done.stderr).splitlines():
        match = WARNING.fullmatch(line)
        sys.stdout.write(f"{lines[int(match[1]) - 1][0]}:{match[2]}\n" if match else f"{line}\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
