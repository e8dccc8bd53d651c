"""Delivers webhooks, signed per Standard Webhooks and retried for three days, from one process.

One thread follows the event stream from the stored position and hands due messages to a few others,
which post them. No worker or request waits for it. `selection.py` decides which messages are next,
and limits how many are in flight per tenant and host. Delivery is at least once: receivers can
recognize duplicates by the `webhook-id` header.
"""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import httpx
import structlog
from standardwebhooks import Webhook

from jobs.errors import StorageUnavailable
from jobs.job import Undelivered
from jobs.queue.decode import Event
from jobs.queue.store import Store
from service.read.events import place
from service.webhooks.address import Refused, target_of
from service.webhooks.notices import Notices
from service.webhooks.outbox import Message, Outbox
from service.webhooks.selection import THREADS, chosen

log = structlog.get_logger(__name__)

RETRY_SECONDS = (0, 5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Delay before each attempt, as recommended by the Standard Webhooks specification."""

BLOCK_SECONDS = 0.25
GATHER_SECONDS = 0.25
"""Delay after events before the next read, to read more of them at once."""

TROUBLE_SECONDS = 2.0
"""Delay after a failure of the store or the disk, and while another process is in charge."""

CURSOR_SECONDS = 60.0
"""How often the reading position is stored while there are events, at least."""

_TIMEOUT = httpx.Timeout(10.0, connect=5.0)
_GONE = 410
_LONGEST_REASON = 300


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Why a delivery failed, and whether that's `final`, so retrying is pointless."""

    reason: str
    final: bool = False


class WebhookSender:
    """Delivers messages from `start` to `stop`; `private()` says if private addresses are allowed.

    `count` is called with the outcome of each attempt: `heard`, `again` or `given_up`.
    """

    def __init__(
        self,
        store: Store,
        outbox: Outbox,
        notices: Notices,
        secret: str,
        *,
        private: Callable[[], bool],
        count: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._outbox = outbox
        self._notices = notices
        self._signer = Webhook(secret)
        self._private = private
        self._count = count
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._waiting: dict[str, Message] = {}
        self._under_way: dict[str, Message] = {}
        self._cursor_stored = 0.0  # when the reading position was stored (monotonic)
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)
        self._posters = ThreadPoolExecutor(THREADS, thread_name_prefix="webhook")
        self._client = httpx.Client(timeout=_TIMEOUT, trust_env=False, follow_redirects=False)

    @property
    def waiting(self) -> int:
        """Number of undelivered messages."""
        with self._lock:
            return len(self._waiting) + len(self._under_way)

    def start(self) -> None:
        """Start following events and delivering messages."""
        self._thread.start()

    def stop(self) -> None:
        """Stop; undelivered messages stay in the outbox."""
        self._stopping.set()
        self._thread.join()
        self._posters.shutdown(wait=False, cancel_futures=True)
        self._client.close()
        self._outbox.leave()

    def _run(self) -> None:
        after: str | None = None
        while not self._stopping.is_set():
            try:
                if after is None:
                    after = self._take_over()
                if after is None:
                    self._stopping.wait(TROUBLE_SECONDS)
                    continue
                after = self._follow(after)
                self._hand_out()
            except (StorageUnavailable, OSError) as error:
                log.warning("webhooks paused", error=str(error))
                self._stopping.wait(TROUBLE_SECONDS)

    def _take_over(self) -> str | None:
        """The position to read from, once this process is in charge of delivery."""
        if not self._outbox.take():
            return None
        with self._lock:
            self._waiting = {message.id: message for message in self._outbox.pending()}
        after = self._outbox.cursor()
        if after is None:
            after = self._store.last_event()
            self._store_cursor(after)
        oldest = self._store.events("0-0", 0)[:1]
        if oldest and after != "0-0" and place(oldest[0].id) > place(after):
            log.warning(
                "events are gone that webhooks may have waited for",
                read_until=after,
                oldest=oldest[0].id,
            )
        return after

    def _store_cursor(self, after: str) -> None:
        self._outbox.move_cursor(after)
        self._cursor_stored = time.monotonic()

    def _follow(self, after: str) -> str:
        """Turn new events into messages and return the new position.

        The position is stored after new messages, otherwise only every CURSOR_SECONDS.
        """
        events = self._store.events(after, BLOCK_SECONDS)
        messages = [message for message in map(self._message, events) if message]
        for message in messages:
            self._outbox.put(message)
        if events:
            after = events[-1].id
            self._stopping.wait(GATHER_SECONDS)
        if messages or (events and time.monotonic() - self._cursor_stored > CURSOR_SECONDS):
            self._store_cursor(after)
            with self._lock:
                self._waiting.update({message.id: message for message in messages})
        return after

    def _message(self, event: Event) -> Message | None:
        """The message for an event, if any. An error only skips that event."""
        try:
            return self._notices.of(event)
        except StorageUnavailable:
            raise
        except Exception:
            log.exception("couldn't create a webhook", job=event.job_id, type=event.type)
            return None

    def _hand_out(self) -> None:
        """Hand the next messages to the posting threads."""
        with self._lock:
            messages = chosen(self._waiting.values(), self._under_way.values(), time.time())
            for message in messages:
                self._under_way[message.id] = self._waiting.pop(message.id)
                self._posters.submit(self._deliver, message)

    def _deliver(self, message: Message) -> None:
        try:
            trouble = self._post(message)
            again = self._settle(message, trouble)
        except Exception as error:  # otherwise the message would be lost with its thread
            log.exception("couldn't deliver a webhook", id=message.id, error=str(error))
            again = replace(message, due=time.time() + TROUBLE_SECONDS)
        with self._lock:
            del self._under_way[message.id]
            if again is not None:
                self._waiting[again.id] = again

    def _settle(self, message: Message, trouble: _Trouble | None) -> Message | None:
        """Remove a delivered or hopeless message; otherwise, store and return its next attempt."""
        attempt = message.attempt + 1
        if trouble is None or trouble.final or attempt >= len(RETRY_SECONDS):
            self._show(message, trouble, None)
            self._count("heard" if trouble is None else "given_up")
            if trouble is not None:
                about = {"id": message.id, "url": message.url, "reason": trouble.reason}
                log.warning("webhook given up", **about)
            self._outbox.remove(message.id)
            return None
        pause = RETRY_SECONDS[attempt] * random.uniform(1.0, 1.1)
        self._count("again")
        log.info("webhook failed", id=message.id, reason=trouble.reason, again_in=round(pause))
        again = replace(message, attempt=attempt, due=time.time() + pause)
        self._show(message, trouble, again.due)
        self._outbox.put(again)
        return again

    def _show(self, message: Message, trouble: _Trouble | None, next_attempt: float | None) -> None:
        """Show a failed attempt in the job, or no longer show it.

        An unreachable queue only costs that display, because delivery doesn't depend on it.
        """
        try:
            if trouble is not None:
                failed = Undelivered(
                    id=message.id,
                    event=message.event,
                    attempts=message.attempt + 1,
                    last_attempt=time.time(),
                    reason=trouble.reason[:_LONGEST_REASON],
                    next_attempt=next_attempt,
                )
                self._store.undelivered(message.job, failed)
            elif message.attempt:
                self._store.delivered(message.job, message.id)
        except StorageUnavailable as error:
            log.warning("couldn't show a webhook in its job", id=message.id, error=str(error))

    def _post(self, message: Message) -> _Trouble | None:
        """Post once; None on success, otherwise the reason of the failure."""
        now = datetime.now(UTC)
        try:
            target = target_of(message.url, private=self._private())
            request = self._client.build_request(
                "POST",
                target.url,
                content=message.body.encode(),
                headers={
                    "host": target.host,
                    "content-type": "application/json",
                    "user-agent": "imagemill",
                    "webhook-id": message.id,
                    "webhook-timestamp": str(int(now.timestamp())),
                    "webhook-signature": self._signer.sign(message.id, now, message.body),
                },
                extensions={"sni_hostname": target.server_name},
            )
            response = self._client.send(request, stream=True)
            response.close()
        except Refused as error:
            return _Trouble(str(error), final=True)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            return _Trouble(str(error) or type(error).__name__)
        if response.is_success:
            return None
        reason = f"the receiver answered {response.status_code}"
        return _Trouble(reason, final=response.status_code == _GONE)
