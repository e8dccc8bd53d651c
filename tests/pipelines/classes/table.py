"""The table of docs/supported-models.md, from the same source as the tests.

    python -m tests.pipelines.classes.table

writes it; a test fails if it's out of date.
"""

from pathlib import Path

import diffusers

from pipelines.families import FAMILIES
from pipelines.families.whole_classes import frames_argument, refusal
from tests.pipelines.classes.catalogue import UNBUILT, built, pipelines
from tests.pipelines.classes.guard import TORCHVISION

PATH = Path(__file__).parents[3] / "docs" / "supported-models.md"

HEAD = """\
# Supported models

How each pipeline class of diffusers {version} is served, by the `_class_name` in a folder's
`model_index.json`. This page is generated: `python -m tests.pipelines.classes.table`.

- *stepped*: requests join and leave between denoising steps.
- *called whole*: compatible requests share one call of the pipeline; *one frame*: the class makes
  videos, and one frame is requested.
- *refused*: the worker doesn't start, and reports the sentence in the last column.

"Tested" means that a tiny pipeline of the class, called whole twice, gives the class's own picture
bit for bit. Stepped families also have their own tests.

{counts}

| class | how | tested | note |
|---|---|---|---|
"""


def table() -> str:
    """The whole page."""
    rows = [_row(name) for name in pipelines()]
    ways = [row[1].partition(",")[0] for row in rows]
    counts = ", ".join(f"{ways.count(way)} {way}" for way in ("stepped", "called whole", "refused"))
    head = HEAD.format(version=diffusers.__version__, counts=f"{len(rows)} classes: {counts}.")
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(name: str) -> tuple[str, str, str, str]:
    pipeline = pipelines()[name]
    sentence = refusal(pipeline)
    if sentence and name not in FAMILIES:
        return f"`{name}`", "refused", "", sentence
    way = "stepped" if name in FAMILIES else "called whole"
    if way == "called whole" and frames_argument(pipeline):
        way += ", one frame"
    needs = name in TORCHVISION
    note = "needs the extra `vision`" if needs else UNBUILT.get(name, "")
    tested = "yes" if name in built() and not needs else "no"
    return f"`{name}`", way, tested, note


if __name__ == "__main__":
    PATH.write_text(table(), encoding="utf-8")
