"""Expands a POST into image requests: fills in defaults, draws seeds, checks every field.

Pure: depends on neither HTTP nor the store. The caller passes the catalog's model and the card that
a worker published for it, if any.
"""

import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from jobs.catalog import Model, problems
from jobs.defaults import as_published
from jobs.errors import FieldProblem, InvalidRequest
from jobs.fields import FIELDS, FROM_MODEL, IN_REQUEST
from jobs.reports import Card, ModelCard, cut_warning
from jobs.request import MAX_SEED, ImageRequest
from service.http.errors import NotReady, summary
from service.submit.schemas import MAX_TEXT_BYTES, ImageSettings, PromptItem, SubmitJob

_ENCODE = json.JSONEncoder(ensure_ascii=False).encode


def draw_seed() -> int:
    """A random seed below 2**32, short enough to type."""
    return secrets.randbelow(2**32)


def image_requests(
    job: SubmitJob,
    model: Model,
    card: ModelCard | None,
    draw: Callable[[], int] = draw_seed,
) -> list[ImageRequest]:
    """The images of a job, in order; each prompt's copies are adjacent.

    The k-th copy of a prompt with an explicit seed gets seed + k, wrapping to 0 after MAX_SEED;
    otherwise each image gets a random seed. Raises InvalidRequest that lists every invalid field,
    and NotReady if the job needs the model's defaults and they aren't known yet.
    """
    model = as_published(model, card)
    properties = card.properties if card else None
    entries = [_as_item(entry) for entry in job.prompts]
    copies = [entry.n or job.n or 1 for entry in entries]
    if sum(copies) > model.limits.max_prompts:
        raise _refused([_too_many(sum(copies), model)])
    firsts = [_request(entry, job, model) for entry in entries]
    size = sum(text_bytes(first) * count for first, count in zip(firsts, copies, strict=True))
    if size > MAX_TEXT_BYTES:
        raise _refused([_too_long(size)])
    refusals: dict[FieldProblem, None] = {}
    requests: list[ImageRequest] = []
    for position, (entry, request) in enumerate(zip(entries, firsts, strict=True)):
        place = _Place(job, position)
        for problem in [*problems(model, request, ""), *_card_problems(request, properties)]:
            refusals[place.of(problem)] = None
        seed = job.seed if entry.seed is None else entry.seed
        requests += copies_of(request, seed, copies[position], draw)
    if refusals:
        raise _refused(list(refusals))
    return requests


def copies_of(
    request: ImageRequest, seed: int | None, count: int, draw: Callable[[], int] = draw_seed
) -> list[ImageRequest]:
    """`count` copies with consecutive seeds, or with random ones if `seed` is None."""
    return [
        replace(request, seed=draw() if seed is None else (seed + copy) % (MAX_SEED + 1))
        for copy in range(count)
    ]


def text_bytes(request: ImageRequest) -> int:
    """Bytes of an image's texts as stored and returned: JSON in UTF-8, without the quotes.

    A lone surrogate, which is refused elsewhere, counts as 3.
    """
    texts = (request.prompt, request.negative_prompt or "")
    return sum(len(_ENCODE(text).encode(errors="surrogatepass")) - 2 for text in texts)


def warnings(
    job: SubmitJob, model: Model, card: ModelCard | None, count: Callable[[str], int]
) -> list[str]:
    """Warnings about what the caller may not expect; `count` returns a text's tokens."""
    if card is None or card.properties is None:
        return []
    entries = [_as_item(entry) for entry in job.prompts]
    usual = as_published(model, card).defaults
    return [
        *_cut(job, entries, card.properties, count),
        *_without_effect(job, entries, card.properties, usual.guidance_scale),
    ]


def _cut(
    job: SubmitJob, entries: list[PromptItem], card: Card, count: Callable[[str], int]
) -> Iterator[str]:
    """Warnings about texts that exceed the model's prompt length."""
    limit = card.max_prompt_tokens
    if limit is None:
        return
    long = [place for place, entry in enumerate(entries) if count(entry.prompt) > limit]
    if long:
        yield f"{cut_warning(limit, 'prompt')}: {_listed('/prompts/', long)}"
    negative = {_first("negative_prompt", entry, job) or "" for entry in entries}
    if any(count(text) > limit for text in negative):
        yield cut_warning(limit, "negative prompt")


def _without_effect(
    job: SubmitJob, entries: list[PromptItem], card: Card, usual_scale: float
) -> Iterator[str]:
    """Warnings about guidance and negative prompts that have no effect on the image."""
    guidance, above = card.guidance, card.guides_above
    if any(_gives(settings, "guidance_scale") for settings in (job, *entries)):
        if guidance == "none":
            yield "guidance_scale has no effect: the model has no guidance"
        elif guidance == "fixed":
            yield "guidance_scale has no effect: the model's pipeline sets its own"
    negative = [
        place for place, entry in enumerate(entries) if _first("negative_prompt", entry, job)
    ]
    if negative and guidance in ("embedded", "none"):
        yield "negative_prompt has no effect: the model has no classifier-free guidance"
    elif guidance == "classifier-free":
        scales = {place: _first("guidance_scale", entries[place], job) for place in negative}
        off = [
            place
            for place, scale in scales.items()
            if (usual_scale if scale is None else scale) <= above
        ]
        if off:
            yield (
                f"negative_prompt has no effect without a guidance_scale above {above:g}: "
                f"{_listed('/prompts/', off)}"
            )


def _first(name: str, entry: PromptItem, job: SubmitJob) -> Any:
    """The prompt's own field, else the job's."""
    own = getattr(entry, name, None)
    return getattr(job, name) if own is None else own


def _listed(pointer: str, places: list[int], most: int = 5) -> str:
    """Pointers to the first places, and the number of further ones."""
    pointers = ", ".join(f"{pointer}{place}" for place in places[:most])
    more = len(places) - most
    return f"{pointers} and {more} more" if more > 0 else pointers


class _Place:
    """Maps a problem with an image request back to the field that the caller wrote."""

    def __init__(self, job: SubmitJob, position: int) -> None:
        self._job = job
        self._entry = job.prompts[position]
        self._pointer = f"/prompts/{position}"

    def of(self, problem: FieldProblem) -> FieldProblem:
        """The same problem, with a pointer into the body."""
        name = problem.pointer.removeprefix("/")
        if isinstance(self._entry, str) and name == "prompt":
            return replace(problem, pointer=self._pointer)
        if isinstance(self._entry, PromptItem) and _gives(self._entry, name):
            return replace(problem, pointer=f"{self._pointer}/{name}")
        if _gives(self._job, name):
            return replace(problem, pointer=f"/{name}")
        return replace(problem, pointer=self._pointer)


def _gives(settings: ImageSettings, name: str) -> bool:
    return getattr(settings, name, None) is not None


def _as_item(entry: str | PromptItem) -> PromptItem:
    return PromptItem(prompt=entry) if isinstance(entry, str) else entry


def _request(entry: PromptItem, job: SubmitJob, model: Model) -> ImageRequest:
    values = {name: _first(name, entry, job) for name in IN_REQUEST if name not in _DRAWN}
    open_names = [name for name, value in values.items() if value is None]
    unknown = [name for name in open_names if name in model.unset]
    if unknown:
        raise NotReady(
            f"no worker has read the model {model.name!r} yet, so its default "
            f"{', '.join(unknown)} isn't known; set it, or try again later"
        )
    for name in open_names:
        is_models = name in FROM_MODEL
        values[name] = getattr(model.defaults, name) if is_models else FIELDS[name].default
    return ImageRequest(model=model.name, prompt=entry.prompt, seed=0, **values)


_DRAWN = ("prompt", "seed")
"""Fields that `_request` doesn't take from the job or the model."""


def _card_problems(request: ImageRequest, card: Card | None) -> list[FieldProblem]:
    """Values that the loaded model doesn't support, according to its card."""
    if card is None:
        return []
    refusals = [
        FieldProblem(f"/{name}", f"{name} must be a multiple of {card.multiple}")
        for name in ("width", "height")
        if getattr(request, name) % card.multiple
    ]
    if card.sizes and (request.width, request.height) not in card.sizes:
        known = ", ".join(f"{width}x{height}" for width, height in card.sizes)
        detail = f"{request.model} only supports {known}: its pipeline changes other sizes"
        refusals.append(FieldProblem("/width", detail))
    return refusals


def _too_many(total: int, model: Model) -> FieldProblem:
    limit = model.limits.max_prompts
    return FieldProblem(
        "/prompts", f"{total} images; a job of {model.name} can have at most {limit}"
    )


def _too_long(size: int) -> FieldProblem:
    return FieldProblem(
        "/prompts",
        f"prompts and negative prompts of all images, including copies, are {size} bytes of "
        f"JSON; a job can have at most {MAX_TEXT_BYTES}",
    )


def _refused(refusals: list[FieldProblem]) -> InvalidRequest:
    return InvalidRequest(summary(len(refusals)), tuple(refusals))
