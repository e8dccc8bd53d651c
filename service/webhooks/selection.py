"""Which messages go next: what is due, a few at once to each host and for each tenant, in turns.

Pure: a message under way may wait ten seconds for a receiver that is dead, and its thread with it.
So nobody's receivers get all threads, and who has fewest under way goes first.
"""

from collections import Counter
from collections.abc import Iterable
from urllib.parse import urlsplit

from service.webhooks.outbox import Message

THREADS = 16
PER_TENANT = 4
PER_HOST = 2


def chosen(waiting: Iterable[Message], under_way: Iterable[Message], now: float) -> list[Message]:
    """The waiting messages that begin now, beside those that are `under_way`."""
    going = {message.id: message for message in under_way}
    hosts = Counter(map(_host, going.values()))
    tenants = Counter(message.tenant for message in going.values())
    ranked: list[tuple[int, Message]] = []
    for message in sorted(waiting, key=lambda one: one.due):
        if message.due > now:
            break
        if message.id in going:  # after a crash an event may be read, and told, once more
            continue
        host, tenant = _host(message), message.tenant
        if hosts[host] < PER_HOST and tenants[tenant] < PER_TENANT:
            hosts[host] += 1
            tenants[tenant] += 1
            ranked.append((tenants[tenant], message))
    ranked.sort(key=lambda one: one[0])
    return [message for _, message in ranked[: THREADS - len(going)]]


def _host(message: Message) -> str:
    return urlsplit(message.url).netloc
