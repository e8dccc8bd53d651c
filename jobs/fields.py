"""Every field of an image request: its type, bounds, help text and other names.

This is the only list of them. The HTTP schemas, the command's flags, CSV and JSONL columns, the
recipe's reader and writer, and the OpenAI and A1111 routes take what they need from here. Some
things have to be written out by hand: the `ImageRequest` dataclass, signatures for type checkers,
the page and the docs. `tests/test_fields.py` compares those with this table.

Bounds hold for every model. A model's own limits, in the catalog, are narrower.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from jobs.request import MAX_COPIES, MAX_PROMPT_CHARACTERS, MAX_SEED, ImageFormat


@dataclass(frozen=True, slots=True)
class RequestField:
    """One field of a request.

    `minimum` and `maximum` are inclusive; for text, `maximum` counts characters. `per_prompt`:
    each prompt may have its own value, in JSON, JSONL and CSV; otherwise there's one per job.
    `in_request`: it's a field of `ImageRequest`, so it reaches the worker and the recipe; otherwise
    only the service uses it. `from_model`: the model has a default for it. `default` applies if
    neither the caller nor the model sets a value. `a1111` is its name in A1111's txt2img, and
    `label` its name in the `parameters` text that A1111 writes into pictures. `engine` is its
    name in diffusers' own calls and the servers that follow them, if it's another one.
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
    engine: str | None = None

    @property
    def flag(self) -> str:
        """Its flag on the command line."""
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
"""Separate, because every other field is optional."""

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
            engine="num_inference_steps",
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
    """The fields' names, in order."""
    return tuple(field.name for field in fields)


PER_PROMPT = names(field for field in FIELDS.values() if field.per_prompt)
"""Fields that can differ per prompt."""

PER_JOB = names(field for field in FIELDS.values() if not field.per_prompt)
"""Fields with one value per job."""

FROM_MODEL = names(field for field in FIELDS.values() if field.from_model)
"""Fields that the model has a default for."""

PER_IMAGE = ("prompt", *(name for name in PER_PROMPT if FIELDS[name].in_request))
"""Fields that can differ between the images of one job."""

IN_REQUEST = ("prompt", *names(field for field in FIELDS.values() if field.in_request))
"""Fields of `ImageRequest` that a caller sets, all except `model`."""
