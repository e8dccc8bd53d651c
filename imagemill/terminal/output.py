"""Output that survives every encoding, and a reader that goes away."""

import codecs
import io
import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console


def tolerate_encodings() -> None:
    """Let stdout and stderr replace characters that their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if stream.errors == "strict" or not _is_unicode(stream):
            stream.reconfigure(errors="replace")


def print_json(value: Any, file: TextIO | None = None) -> None:
    """Write a JSON document to stdout, or to `file`, in pure ASCII unless it takes Unicode."""
    target = file or sys.stdout
    target.write(json.dumps(value, ensure_ascii=not _is_unicode(target), indent=2) + "\n")
    target.flush()


def _is_unicode(stream: TextIO) -> bool:
    return codecs.lookup(stream.encoding or "utf-8").name.startswith("utf")


class PatientConsole(Console):
    """Goes on without output if the reader goes away, as in `imagemill generate ... | head`.

    `on_cut` is called once when that happens. Rich's own console would end the process.
    """

    is_cut = False
    on_cut: Callable[[], None] = staticmethod(lambda: None)

    def on_broken_pipe(self) -> None:
        """Drop all further output."""
        self.quiet = self.is_cut = True
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.file.fileno())
        os.close(null)
        self.on_cut()
