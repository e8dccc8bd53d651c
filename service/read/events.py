"""One reader of the store's event stream per process, which tells whoever watches a job.

    with hub.watch(job_id) as watch:
        ...look at the job...
        await watch.news_within(seconds)

A watch that begins before the look misses nothing. Nor does one that begins after a job was queued
and waits for its end alone: the hub remembers the jobs that ended lately. The reader runs on a
thread of its own; a waiting request holds none. When the store fails, the reader goes on where it
was and wakes everybody. Knows nothing of HTTP.
"""

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import structlog

from jobs.errors import StorageUnavailable
from jobs.job import FINISHED
from jobs.queue.decode import Event
from jobs.queue.store import Store

log = structlog.get_logger(__name__)

RETRY_SECONDS = 1.0
BLOCK_SECONDS = 0.25
"""One read of the stream waits this long, which bounds how long stopping takes."""

GATHER_SECONDS = 0.02
"""After news the reader waits so long for more: under load it reads them together."""

ENDS = frozenset({*FINISHED, "deleted"})
"""Types of the events after which a job is over."""

RECENT_ENDS = 4096
"""Jobs that ended lately which the hub remembers: far more than can end while one is queued."""


class Watch:
    """News of one job. It holds up to `keep` events until they are taken.

    With `ends_only`, nothing but the job's end is news.
    """

    def __init__(self, keep: int, ends_only: bool = False) -> None:
        self._news = asyncio.Event()
        self._events: deque[Event] = deque()
        self._keep = keep
        self.ends_only = ends_only
        self.overflowed = False
        """Whether events were dropped because nobody took them in time."""

    def wake(self) -> None:
        """Wake the watcher, now or when it next waits."""
        self._news.set()

    def add(self, event: Event) -> None:
        """Hold an event, if there is room, and wake the watcher."""
        if len(self._events) < self._keep:
            self._events.append(event)
        else:
            self.overflowed = True
        self.wake()

    def take(self) -> list[Event]:
        """The events since the last time, oldest first."""
        taken = list(self._events)
        self._events.clear()
        return taken

    async def news_within(self, seconds: float) -> bool:
        """Wait for news; False when `seconds` passed without any."""
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return False
        self._news.clear()
        return True


def place(event_id: str) -> tuple[int, int]:
    """Where an event stands in the stream, in milliseconds and a number; ids compare as these."""
    milliseconds, _, sequence = event_id.partition("-")
    return int(milliseconds), int(sequence or 0)


class EventHub:
    """Follows the event stream from `start` to `stop`; one per process and event loop."""

    def __init__(self, store: Store, block_seconds: float = BLOCK_SECONDS) -> None:
        self._store = store
        self._block_seconds = block_seconds
        self._watches: dict[str, set[Watch]] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._listeners: list[Callable[[Sequence[Event]], None]] = []
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.closing = False

    def listen(self, listener: Callable[[Sequence[Event]], None]) -> None:
        """Have `listener` called, on the reader's thread, with all events from now on."""
        self._listeners.append(listener)

    @contextmanager
    def watch(self, job_id: str, keep: int = 0, ends_only: bool = False) -> Iterator[Watch]:
        """A watch on the job until the context ends, which holds up to `keep` events.

        With `ends_only`, only the job's end wakes it: at once if the job has ended lately.
        """
        watch = Watch(keep, ends_only)
        watches = self._watches.setdefault(job_id, set())
        watches.add(watch)
        if ends_only and job_id in self._ended:  # the reader notes an end before it looks for us
            watch.wake()
        try:
            yield watch
        finally:
            watches.discard(watch)
            if not watches:
                self._watches.pop(job_id, None)

    @property
    def watched(self) -> list[str]:
        """Jobs that somebody watches."""
        return list(self._watches)

    def start(self) -> None:
        """Begin to read, from inside the event loop that the watchers run in."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._read, name="events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wake everybody for good: whoever sees `closing` should answer and not wait again."""
        self.closing = True
        self._wake_all()

    async def stop(self) -> None:
        """End the reader and every wait."""
        self._stopping.set()
        self.close()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _read(self) -> None:
        after, failing = None, False
        while not self._stopping.is_set():
            try:
                after = after or self._store.last_event()
                events = self._store.events(after, self._block_seconds)
            except Exception as error:  # a reader that dies would leave every watch blind
                if not (failing and isinstance(error, StorageUnavailable)):
                    log.warning("event stream lost", error=str(error))
                failing = True
                self._stopping.wait(RETRY_SECONDS)
                continue
            if events:
                after = events[-1].id
                for listener in self._listeners:
                    listener(events)
                self._remember_ends(events)
                if any(event.job_id in self._watches for event in events):
                    self._on_loop(self._deliver, events)
            if failing:
                self._on_loop(self._wake_all)
                failing = False
            if events:
                self._stopping.wait(GATHER_SECONDS)

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *arguments)

    def _remember_ends(self, events: Sequence[Event]) -> None:
        """Only the reader's thread changes what is remembered."""
        for event in events:
            if event.type in ENDS:
                self._ended[event.job_id] = None
        while len(self._ended) > RECENT_ENDS:
            self._ended.popitem(last=False)

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            for watch in self._watches.get(event.job_id, ()):
                if not watch.ends_only or event.type in ENDS:
                    watch.add(event)

    def _wake_all(self) -> None:
        for watches in self._watches.values():
            for watch in watches:
                watch.wake()
