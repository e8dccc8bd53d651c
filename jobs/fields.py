"""Every field of an image request: its type, its bounds, its help text and its other names.

The one list of them. The HTTP schemas, the command's flags, CSV and JSONL columns, the recipe's
reader and writer, OpenAI's and A1111's routes take what they need from here;
`tests/test_fields.py` compares with this table what has to be written out by hand: the
`ImageRequest` dataclass, signatures that type checkers read, the page and the docs.

Bounds hold for every model. A model's own limits are narrower; the catalog has them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from jobs.request import MAX_COPIES, MAX_PROMPT_CHARACTERS, MAX_SEED, ImageFormat


@dataclass(frozen=True, slots=True)
class RequestField:
    """One field of a request.

    `minimum` and `maximum` are inclusive; for text, `maximum` counts characters. `per_prompt`:
    each prompt may have its own value, in JSON, JSONL and CSV; otherwise the job has one.
    `in_request`: it belongs to `ImageRequest`, so it travels to the worker and into the recipe;
    otherwise the service uses it up. `from_model`: its default is the model's. `default` is the
    value when neither caller nor model gives one. `a1111` is its name in A1111's txt2img, and
    `label` its name in the `parameters` text that A1111 writes into pictures.
    """

    name: str
    kind: type[str] | type[int] | type[float] | type[bool]
    help: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    per_prompt: bool = True
    in_request: bool = True
    from_model: bool = False
    nullable: bool = False
    default: Any = None
    a1111: str | None = None
    label: str | None = None

    @property
    def flag(self) -> str:
        """The command's flag."""
        return "--" + self.name.replace("_", "-")

    def accepts(self, value: Any) -> bool:
        """Whether `value`, read from JSON, has this field's type. An int is also a float."""
        if value is None:
            return self.nullable
        if self.choices:
            return value in self.choices
        allowed = (int, float) if self.kind is float else self.kind
        return isinstance(value, allowed) and (self.kind is bool or not isinstance(value, bool))


PROMPT = RequestField(
    "prompt",
    str,
    "What to draw.",
    minimum=1,
    maximum=MAX_PROMPT_CHARACTERS,
    a1111="prompt",
)
"""Listed apart, because every other field is optional."""

FIELDS: dict[str, RequestField] = {
    field.name: field
    for field in (
        RequestField(
            "negative_prompt",
            str,
            "What the picture should not show.",
            maximum=MAX_PROMPT_CHARACTERS,
            from_model=True,
            nullable=True,
            a1111="negative_prompt",
            label="Negative prompt",
        ),
        RequestField("width", int, "Pixels.", 16, 65_536, from_model=True, a1111="width"),
        RequestField("height", int, "Pixels.", 16, 65_536, from_model=True, a1111="height"),
        RequestField(
            "steps",
            int,
            "Denoising steps.",
            minimum=1,
            maximum=100_000,
            from_model=True,
            a1111="steps",
            label="Steps",
        ),
        RequestField(
            "guidance_scale",
            float,
            "How strictly to follow the prompt.",
            minimum=0,
            maximum=1000,
            from_model=True,
            a1111="cfg_scale",
            label="CFG scale",
        ),
        RequestField(
            "seed",
            int,
            "Seed of the first copy; the k-th further copy gets seed + k. Default: random.",
            minimum=0,
            maximum=MAX_SEED,
            a1111="seed",
            label="Seed",
        ),
        RequestField(
            "n",
            int,
            "Copies of each prompt. Default: 1.",
            minimum=1,
            maximum=MAX_COPIES,
            in_request=False,
            a1111="batch_size",
        ),
        RequestField(
            "priority",
            int,
            "0 to 9; 9 goes first. Default: 5, or the key's highest if that is lower.",
            minimum=0,
            maximum=9,
            per_prompt=False,
            in_request=False,
        ),
        RequestField(
            "format",
            str,
            "png, jpeg or webp. Default: png.",
            choices=get_args(ImageFormat),
            per_prompt=False,
            default="png",
        ),
        RequestField(
            "reproducible",
            bool,
            "The same bits whatever runs at the same time, at some cost in speed. Default: true.",
            per_prompt=False,
            default=True,
        ),
    )
}


def names(fields: Iterable[RequestField]) -> tuple[str, ...]:
    """Their names, in order."""
    return tuple(field.name for field in fields)


PER_PROMPT = names(field for field in FIELDS.values() if field.per_prompt)
"""Fields that each prompt may have for itself."""

PER_JOB = names(field for field in FIELDS.values() if not field.per_prompt)
"""Fields that a job has once for all its prompts."""

FROM_MODEL = names(field for field in FIELDS.values() if field.from_model)
"""Fields whose default is the model's."""

PER_IMAGE = ("prompt", *(name for name in PER_PROMPT if FIELDS[name].in_request))
"""Fields in which the images of one job may differ."""

IN_REQUEST = ("prompt", *names(field for field in FIELDS.values() if field.in_request))
"""Fields of `ImageRequest` that a caller chooses; `model` is the remaining one."""
