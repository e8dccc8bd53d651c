"""Tables that never cut a name or an id: where a table doesn't fit, each row becomes a block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

SPACING = 2
"""Characters between two columns of a table without a box."""


@dataclass(frozen=True, slots=True)
class Block:
    """One row in a narrow terminal: a first line, and facts below it that may wrap."""

    head: Text
    facts: Sequence[str | Text] = ()

    def render(self) -> RenderableType:
        """The block, as wide as the terminal."""
        facts = [Text.from_markup(fact) if isinstance(fact, str) else fact for fact in self.facts]
        for line in [self.head, *facts]:
            line.overflow = "fold"
        return Group(self.head, *(Padding(fact, (0, 0, 0, SPACING)) for fact in facts if fact))


@dataclass(frozen=True, slots=True)
class Fitting:
    """`table` where it fits, else `blocks`. `cuttable` maps headers to the width they need."""

    table: Table
    blocks: Sequence[Block]
    cuttable: Mapping[str, int] = field(default_factory=dict)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.width <= options.max_width:
            yield self.table
        else:
            yield from (block.render() for block in self.blocks)

    @property
    def width(self) -> int:
        """The least width at which the table cuts only what may be cut."""
        widths = [
            min(_width(column), self.cuttable.get(str(column.header), 10**6))
            for column in self.table.columns
        ]
        return sum(widths) + SPACING * (len(widths) - 1)


def _width(column: Column) -> int:
    lines = [line for cell in (column.header, *column.cells) for line in str(cell).split("\n")]
    return max(map(cell_len, lines))
