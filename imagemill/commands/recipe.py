"""The recipe inside a picture, read back: what `inspect` shows and `replay` follows.

Where it stands in a file is known to `jobs/recipe.py`. A file may come from anywhere, so nothing in
it is believed before it is checked.
"""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from imagemill.client.errors import NoRecipe
from jobs.fields import FIELDS, PROMPT
from jobs.recipe import description
from jobs.request import ImageRequest


@dataclass(frozen=True, slots=True)
class Recipe:
    """The request that a picture was made of, and `made_with`: model, scheduler, versions, ..."""

    request: ImageRequest
    made_with: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """All of it, flat: a fact a name, `versions` one for each package."""
        flat = {**asdict(self.request), **self.made_with}
        versions = flat.pop("versions", None)
        named = versions if isinstance(versions, dict) else {}
        return {**flat, **{f"{name} version": number for name, number in named.items()}}

    def differences(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """The facts that are not the same here and there, each with both values."""
        here, there = self.facts(), other.facts()
        names = [*here, *(name for name in there if name not in here)]
        pairs = {name: (here.get(name), there.get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def read_recipe(path: Path) -> Recipe:
    """The recipe in an image file; raises NoRecipe where there is none, or no image."""
    text = _text(path)
    if not text:
        raise NoRecipe(f"{path}: an image, but without a recipe of imagemill's")
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict) or "prompt" not in value:
        raise NoRecipe(f"{path}: its description is no recipe of imagemill's")
    return _checked(path, value)


def _text(path: Path) -> str | None:
    """The description as written, of whatever there may be."""
    try:
        with Image.open(path) as picture:
            return description(picture)
    except UnidentifiedImageError as error:
        raise NoRecipe(f"{path}: not an image") from error
    except OSError as error:
        raise NoRecipe(f"{path}: {error.strerror or 'not a whole image'}") from error
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise NoRecipe(f"{path}: not an image that can be read: {error}") from error


def _checked(path: Path, value: dict[str, Any]) -> Recipe:
    for item in fields(ImageRequest):
        if item.name not in value and item.default is MISSING:
            raise NoRecipe(f"{path}: its recipe lacks `{item.name}`")
        if item.name in value and not _is_right(item.name, value[item.name]):
            raise NoRecipe(f"{path}: its recipe's `{item.name}` makes no sense")
    names = {item.name for item in fields(ImageRequest)}
    request = ImageRequest(**{name: value[name] for name in value if name in names})
    return Recipe(request, {name: value[name] for name in value if name not in names})


def _is_right(name: str, value: Any) -> bool:
    if name == "model":
        return isinstance(value, str)
    return {"prompt": PROMPT, **FIELDS}[name].accepts(value)
