"""The pause before a process that ended is started again."""

from dataclasses import dataclass

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a restart: doubles from the first to the longest while a process keeps failing."""

SETTLED_SECONDS = 60.0
"""A process that ran this long is assumed to fail for a new reason, so the pause is reset."""


@dataclass(slots=True)
class Backoff:
    """`pause` is how many seconds to wait after the next failure."""

    pause: float = FIRST_PAUSE

    def failed(self, lived: float) -> float:
        """Seconds to wait now that a process has ended after `lived` seconds."""
        if lived > SETTLED_SECONDS:
            self.reset()
        pause, self.pause = self.pause, min(2 * self.pause, LONGEST_PAUSE)
        return pause

    def reset(self) -> None:
        """Start over, because the next start is expected to differ."""
        self.pause = FIRST_PAUSE
