"""Typed reading of one TOML table, with errors that name the table and the field.

Each method takes a field out of the table; `finish` then refuses what remains, so that a misspelt
field is never ignored. What the fields mean is up to the caller.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.errors import ConfigurationError

_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")
_MEMORY = re.compile(r"\d+(\.\d+)?\s?[KMGT]i?B", re.IGNORECASE)


class Entry:
    """One table; `place` names it in errors, such as `models.toml: models.flux`."""

    def __init__(self, place: str, table: Mapping[str, Any]) -> None:
        self._place = place
        self._unread = dict(table)
        self._known: list[str] = []
        self.names = tuple(table)

    def wrong(self, name: str, detail: str) -> ConfigurationError:
        """The error to raise for the field `name`."""
        place = f"{self._place}.{name}" if name else self._place
        return ConfigurationError(f"{place} {detail}")

    def finish(self) -> None:
        """Refuse fields that weren't read."""
        for name in self._unread:
            known = ", ".join(sorted(self._known))
            raise self.wrong(name, f"is not a known field; expected one of {known}")

    def _take(self, name: str, default: Any) -> Any:
        self._known.append(name)
        return self._unread.pop(name, default)

    def table(self, name: str) -> "Entry":
        """A nested table; empty if it's missing."""
        value = self._take(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, "must be a table")
        separator = ": " if self._place.endswith(".toml") else "."
        return Entry(f"{self._place}{separator}{name}", value)

    def text(self, name: str) -> str | None:
        """A non-blank string, or None."""
        value = self._take(name, None)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise self.wrong(name, "must be a non-blank string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty if it's missing."""
        value = self._take(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, "must be a list of strings")
        return tuple(value)

    def one_of(self, name: str, allowed: Sequence[str], default: str) -> str:
        """One of the allowed strings."""
        value = self.one_of_or_none(name, allowed)
        return default if value is None else value

    def one_of_or_none(self, name: str, allowed: Sequence[str]) -> str | None:
        """One of the allowed strings, or None."""
        value = self._take(name, None)
        if value is not None and value not in allowed:
            raise self.wrong(name, f"must be one of {', '.join(allowed)}")
        return None if value is None else str(value)

    def flag(self, name: str) -> bool:
        """True or false; false if it's missing."""
        value = self._take(name, False)
        if not isinstance(value, bool):
            raise self.wrong(name, "must be true or false")
        return value

    def whole_or_none(self, name: str) -> int | None:
        """An integer of at least 1, or None."""
        value = self._take(name, None)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(name, "must be an integer of at least 1")
        return value

    def whole(self, name: str, default: int) -> int:
        """An integer of at least 1."""
        value = self.whole_or_none(name)
        return default if value is None else value

    def number(self, name: str, default: float) -> float:
        """A number of at least 0; infinity and NaN are refused."""
        value = self._take(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < float("inf"):
            raise self.wrong(name, "must be a number of at least 0")
        return float(value)

    def sizes(self, name: str) -> tuple[tuple[int, int], ...]:
        """A list such as `["128x128", "64x128"]`, width first."""
        matches = [(text, _SIZE.fullmatch(text)) for text in self.texts(name)]
        for text, match in matches:
            if match is None:
                raise self.wrong(name, f"has an invalid size {text!r}: expected WIDTHxHEIGHT")
        return tuple((int(match[1]), int(match[2])) for _, match in matches if match)

    def memory(self, name: str) -> dict[str, str | int]:
        """A table of devices with bytes or a size such as `16GB`."""
        value = self._take(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, 'must be a table such as { cpu = "16GB" }')
        for device, size in value.items():
            is_text = isinstance(size, str) and _MEMORY.fullmatch(size)
            is_bytes = isinstance(size, int) and not isinstance(size, bool) and size >= 0
            if not (is_text or is_bytes):
                raise self.wrong(
                    f"{name}.{device}", "must be a number of bytes or a size such as '16GB'"
                )
        return value

    def places(self, name: str) -> dict[str, str | None]:
        """A table of names with strings, or false for None; empty if it's missing."""
        value = self._take(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, 'must be a table such as { vae = "..." }')
        for key, place in value.items():
            if place is not False and (not isinstance(place, str) or not place.strip()):
                raise self.wrong(f"{name}.{key}", "must be a string, or false to leave it out")
        return {key: place or None for key, place in value.items()}

    def choices(self, name: str, allowed: Sequence[str]) -> str | dict[str, str] | None:
        """One of the allowed strings, a table of names with them, or None."""
        value = self._unread.get(name)
        if not isinstance(value, dict):
            return self.one_of_or_none(name, allowed)
        self._take(name, None)
        for key, choice in value.items():
            if choice not in allowed:
                raise self.wrong(f"{name}.{key}", f"must be one of {', '.join(allowed)}")
        return dict(value) or None
