"""Which samples share the next forward pass: pure functions over values.

Knows no GPU, no Redis, no clock and no model: the engine describes what is in flight, and
`choose` answers. Samples of one group (one batch key) may share a forward pass; its size is a
bucket, and what a bucket costs was measured (`Costs`).

Order: priority first, raised by waiting. Inside a priority one sample of each job, then a second
one of each, and so on; among those the job with the least work in flight, where waiting counts too
(shortest remaining processing time, aged). The work of a sample that can no longer be finished in
good time counts several times: it has little more to lose, and others still have. So a large job
does not hold up a small one, and nothing waits for ever. Whose images are claimed at all, by caller
and by priority, the queue has decided before.

A reproducible sample runs in the pinned bucket of its shape and nothing else, so that its bits
never depend on how many ran beside it; fast ones may ride in the pinned bucket's free places.

A pipeline may take several forward passes at once. `choose` then fills one slot after the other:
a group gets the slots that no other group needs, and its fast samples are divided over them.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

BUCKETS = (1, 2, 4, 8, 16, 32)
"""Sizes of a forward batch, in samples."""

PINNED_SLOWDOWN = 1.5
"""The pinned bucket is the largest that costs a lone sample at most this times its own time."""

WORTHWHILE = 0.97
"""A bucket is large enough when it reaches this share of the best images per second."""

WORTH_WAITING = 0.9
"""The same where somebody waits: a larger bucket makes everyone in it slower for little more."""

GOOD_TIME = 4.0
"""An image is made in good time within this many times the time that it takes alone."""

LATE_WEIGHT = 4.0
"""What is late anyway lets go first what is in good time and up to so many times as long.

In a simulation of a device on which batches do not pay, 90 % of all requests come in good time at
1.43 times the load of one after the other; at 1.21 times without this (weight 1), at 1.43 to 1.46
with any weight from 2 to 10.
"""

AGEING = 20.0
"""Seconds of waiting that weigh as much as one second of remaining work."""

PROMOTION_SECONDS = 30.0
"""Waiting this long raises a sample's priority by one, as in the queue."""

LEAST_HELD = 8
"""Samples to hold at least, so that a short one can overtake where batches do not pay."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured seconds of one forward pass by image tokens, as points of ascending tokens."""

    points: tuple[tuple[int, float], ...]

    def seconds(self, tokens: int) -> float:
        """Seconds of a forward pass over `tokens`: linear between points, proportional outside."""
        if not self.points:
            return float(tokens)
        xs = [point[0] for point in self.points]
        at = bisect_left(xs, tokens)
        if at in (0, len(xs)):
            nearest_tokens, seconds = self.points[0 if at == 0 else -1]
            return seconds * tokens / nearest_tokens
        (x0, y0), (x1, y1) = self.points[at - 1], self.points[at]
        return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)

    def pinned(self, tokens: int) -> int:
        """The bucket of reproducible samples of `tokens` each."""
        alone = self.seconds(tokens)
        fits = [b for b in BUCKETS if self.seconds(b * tokens) <= PINNED_SLOWDOWN * alone]
        return max(fits, default=1)

    def largest(self, tokens: int, share: float = WORTHWHILE) -> int:
        """The smallest bucket with this share of the best throughput: the knee."""
        rates = {b: b / self.seconds(b * tokens) for b in BUCKETS}
        best = max(rates.values())
        return min(b for b, rate in rates.items() if rate >= share * best)

    def held(self, tokens: int, slots: int = 1) -> int:
        """How many samples of `tokens` each a worker should hold: a forward batch more than run."""
        return max((slots + 1) * max(self.largest(tokens), self.pinned(tokens)), LEAST_HELD)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sample in flight as the scheduler sees it.

    `tokens` is rows x tokens of one forward pass, `steps` all denoising steps and `remaining` those
    to come, `age` seconds since it was asked for, `waited` seconds without a forward pass since it
    became ready.
    """

    key: str
    job: str
    priority: int
    group: Hashable
    tokens: int
    steps: int
    remaining: int
    age: float
    waited: float
    reproducible: bool


@dataclass(frozen=True, slots=True)
class Forward:
    """The next forward pass: the samples in it, and the bucket that it is padded to."""

    keys: tuple[str, ...]
    bucket: int


def choose(
    candidates: Sequence[Candidate],
    costs: Costs,
    ceilings: Mapping[Hashable, int],
    *,
    slots: int = 1,
    running: int = 0,
    busy: Sequence[Candidate] = (),
) -> Forward | None:
    """The next forward pass, or None when no sample waits for one.

    `ceilings` holds the groups that ran out of memory, and the most samples they may have. `slots`
    is how many forward passes run at once at most, `running` how many run now, fewer than that,
    and `busy` are the samples in those.
    """
    if not candidates:
        return None
    order = in_order(candidates, costs, busy)
    head = order[0]
    group = [c for c in order if c.group == head.group]
    ceiling = ceilings.get(head.group, BUCKETS[-1])
    if head.reproducible:
        bucket = min(costs.pinned(head.tokens), ceiling)
        return Forward(tuple(c.key for c in group[:bucket]), bucket)
    fast = [c for c in group if not c.reproducible]
    share = _share(fast, candidates, busy, slots, slots - running)
    worth = WORTHWHILE if is_late(head, costs) else WORTH_WAITING
    knee = costs.largest(head.tokens, worth)
    largest = min(knee, ceiling)
    members = _within(fast[: min(largest, share)], knee * head.tokens)
    bucket = _bucket(len(members), head.tokens, costs, largest)
    return Forward(tuple(c.key for c in members[:bucket]), bucket)


def _within(members: Sequence[Candidate], tokens: int) -> Sequence[Candidate]:
    """The first of them, and the next ones that fit beside it into so many tokens."""
    totals = accumulate(c.tokens for c in members)
    fitting = sum(total <= tokens for total in totals)
    return members[: max(1, fitting)]


def _bucket(count: int, tokens: int, costs: Costs, largest: int) -> int:
    """The bucket for so many samples: filled, or the next one padded, whichever makes more."""
    filled = max(b for b in BUCKETS if b <= count)
    padded = min(b for b in BUCKETS if b >= count)
    if padded > largest:
        return filled
    gain = count / costs.seconds(padded * tokens)
    return padded if gain > filled / costs.seconds(filled * tokens) else filled


def _share(
    fast: Sequence[Candidate],
    waiting: Sequence[Candidate],
    busy: Sequence[Candidate],
    slots: int,
    free: int,
) -> int:
    """How many of the group's `fast` samples, all that wait, one slot gets.

    So many that each free slot is to have some, and that no slot has more than its part of all
    that are in flight. Each other group takes a slot, as long as one is left for this group.
    """
    group = fast[0].group
    alike = len(fast) + sum(c.group == group and not c.reproducible for c in busy)
    running = {c.group for c in busy}
    others = {c.group for c in waiting} - {group}
    even = -(-alike // max(1, slots - len((others | running) - {group})))
    return min(even, -(-len(fast) // max(1, free - len(others - running))))


def in_order(
    candidates: Sequence[Candidate], costs: Costs, busy: Sequence[Candidate] = ()
) -> list[Candidate]:
    """All candidates, the most urgent first; `busy` count as work of their jobs."""
    work = {c.key: _work(c, costs) for c in [*candidates, *busy]}
    of_job: Counter[str] = Counter()
    turns: dict[str, int] = {}
    ranked = sorted(candidates, key=lambda c: (work[c.key] - c.waited / AGEING, c.key))
    for turn_taker in ranked:
        turns[turn_taker.key] = of_job[turn_taker.job]
        of_job[turn_taker.job] += 1
    in_flight: dict[str, float] = {}
    for c in [*candidates, *busy]:
        in_flight[c.job] = in_flight.get(c.job, 0.0) + work[c.key]
    return sorted(
        ranked,
        key=lambda c: (-_promoted(c), turns[c.key], in_flight[c.job] - c.waited / AGEING),
    )


def is_late(candidate: Candidate, costs: Costs) -> bool:
    """Whether it can no longer be finished in good time, even if it ran alone from now on."""
    step = costs.seconds(candidate.tokens)
    return candidate.age + candidate.remaining * step > GOOD_TIME * candidate.steps * step


def _work(candidate: Candidate, costs: Costs) -> float:
    """Seconds of work that count for the order."""
    weight = LATE_WEIGHT if is_late(candidate, costs) else 1.0
    return weight * candidate.remaining * costs.seconds(candidate.tokens)


def _promoted(candidate: Candidate) -> int:
    return candidate.priority + int(candidate.waited / PROMOTION_SECONDS)
