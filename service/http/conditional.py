"""HTTP preconditions and ranges per RFC 9110, where Starlette deviates from it.

Starlette responds to a malformed Range with 400, and to one unsatisfiable range among several with
416. The RFC ignores the former and serves the rest of the latter. Doesn't depend on any route.
"""

import re

from service.http.errors import Unsatisfiable

_TAG = re.compile(r'(?:W/)?"([^"]*)"')
_RANGES = re.compile(r"bytes\s*=\s*(\d{0,18}-\d{0,18}(?:\s*,\s*\d{0,18}-\d{0,18})*)", re.IGNORECASE)
_MAX_RANGES = 100


def tags(header: str | None) -> list[str]:
    """The entity tags of an If-None-Match, without quotes and weakness; `*` is returned as is."""
    if header is None:
        return []
    return ["*"] if header.strip() == "*" else _TAG.findall(header)


def matches(header: str | None, tag: str) -> bool:
    """Whether an If-None-Match says that the caller already has `tag`."""
    known = tags(header)
    return tag in known or known == ["*"]


def usable_range(header: str | None, if_range: str | None, tag: str, size: int) -> str | None:
    """The Range to serve of `size` bytes, reduced to what exists; None to serve all of them.

    `tag` is the strong entity tag. Raises Unsatisfiable if no requested byte exists.
    """
    match = _RANGES.fullmatch(header.strip()) if header else None
    if match is None or (if_range is not None and if_range.strip() != f'"{tag}"'):
        return None
    ranges = [part.strip().split("-") for part in match[1].split(",")]
    if len(ranges) > _MAX_RANGES or any(_malformed(first, last) for first, last in ranges):
        return None
    satisfiable = [(first, last) for first, last in ranges if _exists(first, last, size)]
    if not satisfiable:
        raise Unsatisfiable(size)
    return "bytes=" + ",".join(f"{first}-{last}" for first, last in satisfiable)


def single_range(header: str | None, if_range: str | None, tag: str, size: int) -> range | None:
    """The one range of bytes to serve; None to serve all of them, also if several are requested.

    Raises Unsatisfiable.
    """
    usable = usable_range(header, if_range, tag, size)
    if usable is None or "," in usable:
        return None
    first, last = usable.removeprefix("bytes=").split("-")
    if not first:
        return range(max(0, size - int(last)), size)
    return range(int(first), min(size, int(last) + 1) if last else size)


def _malformed(first: str, last: str) -> bool:
    return not (first or last) or bool(first and last and int(last) < int(first))


def _exists(first: str, last: str, size: int) -> bool:
    return int(first) < size if first else int(last) > 0
