"""Which warm-up trials workers didn't survive: a note next to the profile, removed by success."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from jobs.request import ImageRequest

log = structlog.get_logger(__name__)

DEADLY = 2
"""A trial that this many workers ended in isn't run again."""


class Trials:
    """Crash markers: written before each warm-up trial and removed after it.

    One that's still there means that the worker died in its trial.

    In a group, what does not fit a device ends the group and its processes, and every later start
    would try it again. A worker may also be killed for another reason while it tries, or beside
    one that tries the same: so it takes more than one death, counted from start to start, and a
    success removes the note. A note may cost a bucket, never an image.
    """

    def __init__(self, profile: Path) -> None:
        self._profile = profile
        notes = profile.parent.glob(f"{profile.stem}.*.trial")
        self._deaths = {note.name: _count(note) for note in notes}

    def is_deadly(self, request: ImageRequest, bucket: int) -> bool:
        """Whether workers keep ending in it; said to the log."""
        note = self._note(request, bucket)
        if self._deaths.get(note.name, 0) < DEADLY:
            return False
        log.warning(
            "warm-up: left out, as workers ended in it; remove the note to try again",
            bucket=bucket,
            size=f"{request.width}x{request.height}",
            note=str(note),
        )
        return True

    @contextmanager
    def trying(self, request: ImageRequest, bucket: int) -> Iterator[None]:
        """Keep a note while it runs; an error that ends the worker leaves it there.

        Where there is no room for a note, it runs without one.
        """
        note = self._note(request, bucket)
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(str(self._deaths.get(note.name, 0) + 1))
        except OSError as error:
            log.warning("warm-up: no note can be kept", note=str(note), reason=str(error))
        yield
        note.unlink(missing_ok=True)

    def _note(self, request: ImageRequest, bucket: int) -> Path:
        trial = f"{request.width}x{request.height}x{bucket}"
        return self._profile.with_name(f"{self._profile.stem}.{trial}.trial")


def _count(note: Path) -> int:
    """Deaths that a note tells of; none if it is gone again or just being written."""
    try:
        return int(note.read_text() or 0)
    except (OSError, ValueError):
        return 0
