"""A lock that threads acquire in the order in which they asked for it.

With `threading.Lock`, a thread that runs steps without a pause can acquire the lock again and again
while another thread waits.
"""

from collections import deque
from threading import Condition
from types import TracebackType


class FairLock:
    """Held by `with`, by one thread at a time; not reentrant."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._queue: deque[object] = deque()  # the first ticket is the holder's

    @property
    def waiting(self) -> int:
        """How many threads are waiting for the lock."""
        return max(0, len(self._queue) - 1)

    def __enter__(self) -> None:
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                self._changed.wait_for(lambda: self._queue[0] is ticket)
            except BaseException:  # a signal handler may raise while this waits
                self._queue.remove(ticket)
                self._changed.notify_all()
                raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._queue.popleft()
            self._changed.notify_all()
