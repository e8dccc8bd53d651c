"""Selects the next messages to send: due ones, with limits per host and per tenant.

Pure. Sending to a dead receiver blocks a thread for ten seconds. So no host or tenant can occupy
all threads, and tenants with the fewest messages in flight go first.
"""

from collections import Counter
from collections.abc import Iterable
from urllib.parse import urlsplit

from service.webhooks.outbox import Message

THREADS = 16
PER_TENANT = 4
PER_HOST = 2


def chosen(waiting: Iterable[Message], under_way: Iterable[Message], now: float) -> list[Message]:
    """The waiting messages to send now, in addition to those already `under_way`."""
    going = {message.id: message for message in under_way}
    hosts = Counter(map(_host, going.values()))
    tenants = Counter(message.tenant for message in going.values())
    ranked: list[tuple[int, Message]] = []
    for message in sorted(waiting, key=lambda message: message.due):
        if message.due > now:
            break
        if message.id in going:  # after a crash, an event may be read and turned into one again
            continue
        host, tenant = _host(message), message.tenant
        if hosts[host] < PER_HOST and tenants[tenant] < PER_TENANT:
            hosts[host] += 1
            tenants[tenant] += 1
            ranked.append((tenants[tenant], message))
    ranked.sort(key=lambda pair: pair[0])
    return [message for _, message in ranked[: THREADS - len(going)]]


def _host(message: Message) -> str:
    return urlsplit(message.url).netloc
