"""Which options of a catalog entry go with which placement, kind of model, and other options.

`RULES` is the only table of such refusals. The catalog, the workers and `imagemill plan` ask
`refusal`; docs/models.md shows the table. Options without a rule go with everything.
"""

from collections.abc import Collection
from dataclasses import dataclass

from jobs.errors import ConfigurationError

REPLICA, SPLIT = "replica", "split"
CONTEXT_PARALLEL, PIPELINED = "context_parallel", "pipelined"
PLACEMENTS = (REPLICA, SPLIT, CONTEXT_PARALLEL, PIPELINED)

LAYOUT = ("ring", "ulysses", "cfg", "tensor", "stages", "chunks", "unload", "max_memory")
"""Options that lay a model out in its placement; `imagemill plan` chooses them itself."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One condition of an option; only one of the middle three fields is set.

    `placements` are those that take the option. `stepped` is True if the model must have a family,
    False if it must be called whole. `without` are options that it can't be combined with. `why` is
    the reason, if it isn't obvious.
    """

    option: str
    placements: tuple[str, ...] = ()
    stepped: bool | None = None
    without: tuple[str, ...] = ()
    why: str = ""

    def is_broken(
        self, placement: str | None, options: Collection[str], stepped: bool | None
    ) -> bool:
        """Whether an entry with these options breaks the rule; None is a fact not known yet."""
        if self.option not in options:
            return False
        if self.placements:
            return placement is not None and placement not in self.placements
        if self.stepped is not None:
            return stepped is not None and stepped != self.stepped
        return any(other in options for other in self.without)

    def detail(self, class_name: str = "") -> str:
        """The refusal, to follow the option's name. `class_name` is the refused pipeline's."""
        if self.placements:
            detail = f"requires placement {' or '.join(map(repr, self.placements))}"
        elif self.stepped is not None:
            detail = (
                f"requires a model that's {serving(self.stepped)}, but {class_name} is "
                f"{serving(not self.stepped)}"
            )
        else:
            detail = f"can't be combined with {' or '.join(self.without)}"
        return f"{detail}: {self.why}" if self.why else detail


def serving(stepped: bool) -> str:
    """How a model is served, in words."""
    return "stepped" if stepped else "called whole"


RULES = (
    Rule("ring", (CONTEXT_PARALLEL,)),
    Rule("ulysses", (CONTEXT_PARALLEL,)),
    Rule("cfg", (CONTEXT_PARALLEL,)),
    Rule("tensor", (CONTEXT_PARALLEL,)),
    Rule(
        "tensor",
        without=("ring", "ulysses"),
        why="diffusers splits a model's weights or its sequence, not both",
    ),
    Rule("stages", (PIPELINED,)),
    Rule("chunks", (PIPELINED,)),
    Rule("max_memory", (SPLIT,)),
    Rule("unload", (SPLIT,)),
    Rule("unload", stepped=True, why="a whole call has no stages to unload"),
    Rule("compile", (REPLICA, SPLIT)),
    Rule("compile", without=("unload",), why="every load would compile again"),
    Rule("cuda_graphs", (REPLICA,)),
    Rule("cuda_graphs", stepped=True),
    Rule("quantization", (REPLICA, SPLIT), why="the others read plain weights block by block"),
    Rule("cache", (REPLICA,)),
    Rule(
        "cache",
        stepped=False,
        why="a cache keeps the rows of the last step, which can be other images' in the next one",
    ),
)


def refusal(
    placement: str | None, options: Collection[str], stepped: bool | None = None
) -> Rule | None:
    """The first rule that an entry with these options breaks.

    `stepped` says whether the model has a family. It's None before the model's folder was read, and
    `placement` is None to check only the rules that hold for every placement.
    """
    broken = (rule for rule in RULES if rule.is_broken(placement, options, stepped))
    return next(broken, None)


def check_options(
    placement: str | None, options: Collection[str], class_name: str, stepped: bool
) -> None:
    """Refuse what `refusal` finds once the model's class is known. Raises ConfigurationError."""
    rule = refusal(placement, options, stepped)
    if rule:
        raise ConfigurationError(f"{rule.option} {rule.detail(class_name)}")
