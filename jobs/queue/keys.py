"""Every key that the store uses, what it holds, and when it goes: the one place for both.

All keys of a pool share the hash tag `{pool}`, so that scripts work on a cluster; scale out by
adding pools. The names below are given to the Lua scripts as they stand (`lua_tables`). Knows
nothing of how the keys are used.

A key without a lifetime here is bounded: it holds only what is queued, running or alive, one field
a model, or is trimmed at every write.
"""

from dataclasses import dataclass

NAMES = {
    # One job. They get a TTL when it ends, and go earlier if the collector removes its files.
    "job": "job:%s",  # hash: tenant, model, counts, times, and what `job_of` in prelude.lua lists
    "requests": "job:%s:requests",  # list: "WIDTH HEIGHT STEPS\n" + JSON, by index
    "images": "job:%s:images",  # hash: index -> JSON record; an image never claimed has none
    "steps": "job:%s:steps",  # hash: index -> last reported step, of running images only
    "again": "job:%s:again",  # zset: index -> index, requeued and ready
    "later": "job:%s:later",  # zset: index -> ms when it may run again
    # One tenant.
    "jobs": "jobs:%s",  # zset: job -> created, microseconds; TTL once nothing of it is unfinished
    "quota": "quota",  # hash: tenant -> images queued or running
    "once": "once:%s",  # hash: job id and body hash of one Idempotency-Key
    # Who is next, per model and priority (lua/order.lua). They exist while something is ready.
    "ready": "ready:%s:%s",  # zset: tenant -> tag
    "fair": "fair:%s:%s:%s",  # zset of one tenant: job -> tag
    "load": "load:%s:%s",  # hash: n:<tenant> -> ready images, c:<tenant> -> their cost
    "idle": "idle:%s:%s",  # zset: tenant that has just left -> its last tag
    "depth": "depth",  # hash: <model>:<priority> -> ready images
    "times": "times",  # hash: <model> -> ready since, <model>:<priority> -> last served; ms
    "bell": "bell:%s",  # list of one model: a token for each idle worker to wake
    # Workers.
    "wishes": "wishes",  # zset: job:index -> ms until which somebody wants to see a preview
    "leases": "leases",  # zset: job:index -> deadline, ms
    "claimed": "claimed:%s",  # list of one worker: nonce, then key and token of its last claim
    "fence": "fence",  # counter: half of every token
    "worker": "worker:%s",  # string: JSON of one registered worker
    "workers": "workers",  # zset: worker -> ms when its registration ends
    "cards": "cards",  # hash: model -> JSON of what its workers learnt
    "tallies": "tallies",  # hash: <what>:<model> -> how often it happened, ever
    # Clocks and news.
    "swept": "swept",  # hash: at -> ms of the last sweep, lease -> ms of the last claim's leases
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
    # Longer than a laptop sleeps.
    "swept": 30 * 24 * 3600 * 1000,
    "jobs": 90 * 24 * 3600 * 1000,
    # A finished job's keys outlive its end by `keep_seconds` and this: the collector comes first.
    "job_grace": 24 * 3600 * 1000,
    # A worker may still be writing a file of a job that was deleted, or cancelled just before.
    "deleted_grace": 60 * 1000,
    # Whoever was told to remove a job's files has failed if they are still there after this.
    "collecting": 60 * 1000,
}

WAITS_MS = (100, 500, 1000, 5000, 15_000, 60_000, 300_000, 1_800_000, 7_200_000)
"""Upper bounds by which the waits for a first claim are tallied."""

BOUNDS = {"events": 100_000, "bell": 64}
"""Largest length of a stream (roughly) and of a list."""

FOREVER = frozenset(
    {"quota", "leases", "fence", "workers", "cards", "tallies", "delayed", "gc", "events"}
)
"""Keys that may stay when nothing is queued or running."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The key names of one pool."""

    pool: str

    @property
    def prefix(self) -> str:
        """What all keys of the pool begin with."""
        return f"im:{{{self.pool}}}:"

    def __call__(self, name: str, *parts: object) -> str:
        """The key of that name in `NAMES`, its blanks filled with `parts`."""
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
