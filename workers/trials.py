"""Records which warm-up trials killed workers, in notes next to the profile."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from jobs.request import ImageRequest

log = structlog.get_logger(__name__)

DEADLY = 2
"""A trial that this many workers died in isn't run again."""


class Trials:
    """Crash markers: written before each warm-up trial and removed after it.

    One that's still there means that the worker died in its trial.

    In a group, a batch that doesn't fit a device kills the whole group, and every later start would
    try it again. But a worker may also be killed for another reason during a trial, or because
    another worker runs the same one. So it takes more than one death, counted from start to start,
    and a success removes the note. A wrong note costs a larger batch size, never an image.
    """

    def __init__(self, profile: Path) -> None:
        self._profile = profile
        notes = profile.parent.glob(f"{profile.stem}.*.trial")
        self._deaths = {note.name: _count(note) for note in notes}

    def is_deadly(self, request: ImageRequest, bucket: int) -> bool:
        """Whether workers keep dying in this trial; if so, logs a warning."""
        note = self._note(request, bucket)
        if self._deaths.get(note.name, 0) < DEADLY:
            return False
        log.warning(
            "warm-up: skipping a batch size that workers died in; delete the note to try again",
            bucket=bucket,
            size=f"{request.width}x{request.height}",
            note=str(note),
        )
        return True

    @contextmanager
    def trying(self, request: ImageRequest, bucket: int) -> Iterator[None]:
        """Keep a note while the trial runs; if the worker dies in it, the note stays.

        If the note can't be written, the trial runs without one.
        """
        note = self._note(request, bucket)
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(str(self._deaths.get(note.name, 0) + 1))
        except OSError as error:
            log.warning("warm-up: can't write note", note=str(note), reason=str(error))
        yield
        note.unlink(missing_ok=True)

    def _note(self, request: ImageRequest, bucket: int) -> Path:
        trial = f"{request.width}x{request.height}x{bucket}"
        return self._profile.with_name(f"{self._profile.stem}.{trial}.trial")


def _count(note: Path) -> int:
    """Number of deaths in a note; 0 if it was just removed or is being written."""
    try:
        return int(note.read_text() or 0)
    except (OSError, ValueError):
        return 0
