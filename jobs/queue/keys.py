"""Every key that the store uses, what it holds, and when it expires.

All keys of a pool share the hash tag `{pool}`, so that scripts work on a cluster; add pools to
scale out. The Lua scripts get the names below through `lua_tables`.

A key without a lifetime here is bounded: it holds only what's queued, running or alive, or one
field per model, or it's trimmed at every write.
"""

from dataclasses import dataclass

NAMES = {
    # One job. They get a TTL when it ends, and are deleted earlier if its files are removed.
    "job": "job:%s",  # hash: tenant, model, counts, times; `job_of` in prelude.lua lists all
    "requests": "job:%s:requests",  # list: "WIDTH HEIGHT STEPS\n" + JSON, by index
    "images": "job:%s:images",  # hash: index -> JSON record; none if never claimed
    "steps": "job:%s:steps",  # hash: index -> last reported step; running images only
    "again": "job:%s:again",  # zset: index -> index; queued again and ready
    "later": "job:%s:later",  # zset: index -> ms when it's due
    # One tenant.
    "jobs": "jobs:%s",  # zset: job -> created, microseconds; TTL once no image is unfinished
    "quota": "quota",  # hash: tenant -> images queued or running
    "once": "once:%s",  # hash: job id and body hash of an Idempotency-Key
    # The fair order, per model and priority (lua/order.lua). They exist while something is ready.
    "ready": "ready:%s:%s",  # zset: tenant -> tag
    "fair": "fair:%s:%s:%s",  # zset per tenant: job -> tag
    "load": "load:%s:%s",  # hash: n:<tenant> -> ready images, c:<tenant> -> their cost
    "idle": "idle:%s:%s",  # zset: tenant that recently left -> its last tag
    "depth": "depth",  # hash: <model>:<priority> -> ready images
    "times": "times",  # hash: <model> -> ready since, <model>:<priority> -> last served; ms
    "bell": "bell:%s",  # list per model: a token for each idle worker to wake
    # Workers.
    "wishes": "wishes",  # zset: job:index -> ms when a wish for previews ends
    "leases": "leases",  # zset: job:index -> deadline, ms
    "claimed": "claimed:%s",  # list per worker: last claim's nonce, then each lease's key and token
    "fence": "fence",  # counter: half of every token
    "worker": "worker:%s",  # string: JSON report of a registered worker
    "workers": "workers",  # zset: worker -> ms when its registration ends
    "cards": "cards",  # hash: model -> JSON card that its workers published
    "tallies": "tallies",  # hash: <what>:<model> -> how often it has happened
    # Clocks and events.
    "swept": "swept",  # hash: at -> time of the last sweep, lease -> length of the last lease; ms
    "delayed": "delayed",  # zset: job -> ms when its first `later` image is due
    "gc": "gc",  # zset: job -> ms when its files can go
    "events": "events",  # stream
}

LIFETIMES_MS = {
    "once": 24 * 3600 * 1000,
    "once_without_key": 10 * 60 * 1000,
    "claimed": 3600 * 1000,
    "bell": 60 * 1000,
    "wish": 15 * 1000,
    # Longer than any laptop sleeps.
    "swept": 30 * 24 * 3600 * 1000,
    "jobs": 90 * 24 * 3600 * 1000,
    # A finished job's keys are kept for `keep_seconds` and this, so that the collector comes first.
    "job_grace": 24 * 3600 * 1000,
    # A worker may still be writing a file of a job that was just deleted or cancelled.
    "deleted_grace": 60 * 1000,
    # Deadline for removing a job's files; past it, the removal is retried.
    "collecting": 60 * 1000,
}

WAITS_MS = (100, 500, 1000, 5000, 15_000, 60_000, 300_000, 1_800_000, 7_200_000)
"""Upper bounds of the histogram of waits for a first claim."""

BOUNDS = {"events": 100_000, "bell": 64}
"""Largest length of the stream (approximate) and of the list."""

FOREVER = frozenset(
    {"quota", "leases", "fence", "workers", "cards", "tallies", "delayed", "gc", "events"}
)
"""Keys that may exist while nothing is queued or running."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The key names of one pool."""

    pool: str

    @property
    def prefix(self) -> str:
        """The prefix of all the pool's keys."""
        return f"im:{{{self.pool}}}:"

    def __call__(self, name: str, *parts: object) -> str:
        """The key with that name in `NAMES`, with its placeholders filled from `parts`."""
        return self.prefix + NAMES[name] % parts


def lua_tables() -> str:
    """`NAMES`, `LIFETIMES_MS`, `BOUNDS` and `WAITS_MS` as Lua source."""
    names = ", ".join(f"{name} = '{pattern}'" for name, pattern in NAMES.items())
    lifetimes = ", ".join(f"{name} = {value}" for name, value in LIFETIMES_MS.items())
    bounds = ", ".join(f"{name} = {value}" for name, value in BOUNDS.items())
    waits = ", ".join(map(str, WAITS_MS))
    return (
        f"local NAME = {{{names}}}\nlocal LIFETIME = {{{lifetimes}}}\nlocal BOUND = {{{bounds}}}\n"
        f"local WAITS = {{{waits}}}\n"
    )
