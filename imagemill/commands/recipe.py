"""Reads the recipe stored in an image, for `inspect` and `replay`.

`jobs/recipe.py` knows where it's stored. Files may come from anywhere, so everything in them is
validated before use.
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
    """The request an image was generated from, and `made_with`: scheduler, versions, ..."""

    request: ImageRequest
    made_with: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """All values as one flat mapping, with an entry for each package in `versions`."""
        flat = {**asdict(self.request), **self.made_with}
        versions = flat.pop("versions", None)
        packages = versions if isinstance(versions, dict) else {}
        return {**flat, **{f"{name} version": number for name, number in packages.items()}}

    def differences(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """The values that differ between the two recipes, each as a pair."""
        here, there = self.facts(), other.facts()
        names = [*here, *(name for name in there if name not in here)]
        pairs = {name: (here.get(name), there.get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def read_recipe(path: Path) -> Recipe:
    """The recipe in an image file. Raises NoRecipe if it has none or isn't an image."""
    text = _text(path)
    if not text:
        raise NoRecipe(f"{path}: this image has no imagemill recipe")
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict) or "prompt" not in value:
        raise NoRecipe(f"{path}: its description isn't an imagemill recipe")
    return _checked(path, value)


def _text(path: Path) -> str | None:
    """The raw description, if there is one. Raises NoRecipe for anything but a readable image."""
    try:
        with Image.open(path) as picture:
            return description(picture)
    except UnidentifiedImageError as error:
        raise NoRecipe(f"{path}: not an image") from error
    except OSError as error:
        raise NoRecipe(f"{path}: {error.strerror or 'the image is truncated'}") from error
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise NoRecipe(f"{path}: couldn't read the image: {error}") from error


def _checked(path: Path, value: dict[str, Any]) -> Recipe:
    for item in fields(ImageRequest):
        if item.name not in value and item.default is MISSING:
            raise NoRecipe(f"{path}: its recipe lacks `{item.name}`")
        if item.name in value and not _is_right(item.name, value[item.name]):
            raise NoRecipe(f"{path}: its recipe has an invalid `{item.name}`")
    names = {item.name for item in fields(ImageRequest)}
    request = ImageRequest(**{name: value[name] for name in value if name in names})
    return Recipe(request, {name: value[name] for name in value if name not in names})


def _is_right(name: str, value: Any) -> bool:
    if name == "model":
        return isinstance(value, str)
    return {"prompt": PROMPT, **FIELDS}[name].accepts(value)
