"""Whose turn it is to use a pipeline whose stages' weights take turns on the device.

Under a phased pipeline the worker encodes all that it holds, then denoises all of it, then decodes
all, so that each stage's weights are loaded once a round and not once an image:

    ENCODE (intake) -> DENOISE (engine) -> DECODE (delivery) -> ENCODE ...

One phase is open at a time; the thread that it belongs to ends it, which opens the next. A round
takes what there is when it begins: what is claimed while prompts are encoded joins it, what comes
later waits for the next. Under any other pipeline every phase is open, always. Knows no model, no
queue and no flight.
"""

import threading
from enum import Enum


class Phase(Enum):
    """What one thread may do with the pipeline while no other may."""

    ENCODE = 0
    DENOISE = 1
    DECODE = 2

    @property
    def following(self) -> "Phase":
        """The phase that opens when this one ends."""
        return Phase((self.value + 1) % len(Phase))


class Phases:
    """The open phase of a `phased` pipeline; of any other one all are open."""

    def __init__(self, *, phased: bool) -> None:
        self.phased = phased
        self._open = Phase.ENCODE
        self._changed = threading.Condition()

    def wait(self, phase: Phase, seconds: float) -> bool:
        """Wait for the phase, at most so long; whether it is open."""
        with self._changed:
            return not self.phased or self._changed.wait_for(lambda: self._open is phase, seconds)

    def end(self, phase: Phase) -> None:
        """The phase's thread has done all there was to do: open the next. No other may call it."""
        if not self.phased:
            return
        with self._changed:
            if self._open is not phase:
                raise RuntimeError(f"{phase.name} ended while {self._open.name} was open")
            self._open = phase.following
            self._changed.notify_all()
