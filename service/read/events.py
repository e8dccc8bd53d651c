"""One reader of the store's event stream per process, which notifies requests that watch a job.

    with hub.watch(job_id) as watch:
        ...read the job...
        await watch.news_within(seconds)

A watch that starts before the job is read misses nothing. Neither does one that starts after the
job was queued, if it only waits for the job's end, because the hub remembers recently ended jobs.
The reader runs on its own thread; waiting requests don't hold one. After a store failure, the
reader resumes where it stopped and wakes all watches. Doesn't depend on HTTP.
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
"""How long one read of the stream blocks, and so the longest time that stopping takes."""

GATHER_SECONDS = 0.02
"""How long the reader pauses after events, to read more of them at once under load."""

ENDS = frozenset({*FINISHED, "deleted"})
"""Types of the events that end a job."""

RECENT_ENDS = 4096
"""How many ended jobs the hub remembers: far more than can end while a job is being queued."""


class Watch:
    """Notifies of one job's events, and holds up to `keep` of them until they're taken.

    With `ends_only`, it only reacts to the job's end.
    """

    def __init__(self, keep: int, ends_only: bool = False) -> None:
        self._news = asyncio.Event()
        self._events: deque[Event] = deque()
        self._keep = keep
        self.ends_only = ends_only
        self.overflowed = False
        """Whether events were dropped because they weren't taken in time."""

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
        """The events since the last call, oldest first."""
        events = list(self._events)
        self._events.clear()
        return events

    async def news_within(self, seconds: float) -> bool:
        """Wait for an event or a wake-up; False if `seconds` pass without one."""
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return False
        self._news.clear()
        return True


def place(event_id: str) -> tuple[int, int]:
    """An event's position in the stream, as milliseconds and sequence number, to compare ids by."""
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
        """Call `listener` with all events from now on, on the reader's thread."""
        self._listeners.append(listener)

    @contextmanager
    def watch(self, job_id: str, keep: int = 0, ends_only: bool = False) -> Iterator[Watch]:
        """A watch on the job until the context exits, which holds up to `keep` events.

        With `ends_only`, only the job's end wakes it, immediately if the job ended recently.
        """
        watch = Watch(keep, ends_only)
        watches = self._watches.setdefault(job_id, set())
        watches.add(watch)
        # No race: the reader records an end before it looks for watches.
        if ends_only and job_id in self._ended:
            watch.wake()
        try:
            yield watch
        finally:
            watches.discard(watch)
            if not watches:
                self._watches.pop(job_id, None)

    @property
    def watched(self) -> list[str]:
        """The jobs with a watch."""
        return list(self._watches)

    def start(self) -> None:
        """Start reading. Call it from the event loop that the watches run in."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._read, name="events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wake all watches and set `closing`, after which requests should respond, not wait."""
        self.closing = True
        self._wake_all()

    async def stop(self) -> None:
        """Stop the reader and end all waits."""
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
            except Exception as error:  # without the reader, no watch would ever be notified
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
        """Record ended jobs; only called on the reader's thread."""
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
