"""Which thread may use a pipeline whose stages take turns on the device.

With a phased pipeline the worker encodes all images it holds, then denoises all of them, then
decodes them, so each stage's weights are loaded once per round instead of once per image:

    ENCODE (intake) -> DENOISE (engine) -> DECODE (delivery) -> ENCODE ...

One phase is open at a time, and the thread that it belongs to ends it, which opens the next. Images
claimed while the round's prompts are encoded join it, and later ones wait for the next round. With
any other pipeline every phase is always open.
"""

import threading
from enum import Enum


class Phase(Enum):
    """A use of the pipeline that's reserved for one thread."""

    ENCODE = 0
    DENOISE = 1
    DECODE = 2

    @property
    def following(self) -> "Phase":
        """The phase that opens when this one ends."""
        return Phase((self.value + 1) % len(Phase))


class Phases:
    """The open phase of a `phased` pipeline. If it isn't phased, all are open."""

    def __init__(self, *, phased: bool) -> None:
        self.phased = phased
        self._open = Phase.ENCODE
        self._changed = threading.Condition()

    def wait(self, phase: Phase, seconds: float) -> bool:
        """Wait up to `seconds` for the phase to open; False on timeout."""
        with self._changed:
            return not self.phased or self._changed.wait_for(lambda: self._open is phase, seconds)

    def end(self, phase: Phase) -> None:
        """End the phase and open the next. Only the phase's own thread may call this."""
        if not self.phased:
            return
        with self._changed:
            if self._open is not phase:
                raise RuntimeError(f"{phase.name} ended while {self._open.name} was open")
            self._open = phase.following
            self._changed.notify_all()
