"""Which samples share the next forward pass: pure functions over values.

Knows no GPU, no Redis, no clock and no model: the engine describes what is in flight, and
`choose` answers. Samples of one group (one batch key) may share a forward pass; its size is a
bucket, and what a bucket costs was measured (`Costs`).

Order: priority first, raised by waiting. Inside a priority one sample of each job, then a second
one of each, and so on, so that a large job doesn't hold up a small one. Among those, the job with
the least work in flight (shortest remaining processing time), where the work of a late sample
counts several times: it has little more to lose, and on-time ones still have. Equal work goes by
age.

That alone would starve late samples while newer ones keep coming. So each sample keeps count of
the time that newer ones ran while it waited (`overtaken`), and a late sample for which that is more
than a fixed share of its age is overdue. Overdue samples go first within their round, the oldest at
the head. Which images are claimed at all, the queue has decided by caller and priority.

A reproducible sample runs in the pinned bucket of its shape and nothing else, so that its bits
never depend on how many ran beside it; fast ones may ride in the pinned bucket's free places.

A pipeline may take several forward passes at once. `choose` then fills one slot after the other:
a group gets the slots that no other group needs, and its fast samples are divided over them.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
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
"""Factor on a late sample's remaining work: an on-time one up to four times as long goes first."""

PASSED_BY_EQUALS = 0.28
"""Share of a late sample's age that newer samples of at least its own work may take.

Its latency is then at most about 1 / (1 - 0.28) = 1.4 times that under first come, first served.
"""

PASSED_BY_ANY = 0.9
"""The same for all newer samples, shorter ones included, so that those can't starve long ones."""

PROMOTION_SECONDS = 30.0
"""Waiting this long raises a sample's priority by one, as in the queue."""

LEAST_HELD = 8
"""Samples to hold at least, so that a short one can overtake where batches do not pay."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured seconds of one forward pass.

    `points` are seconds by image tokens, of ascending tokens. `exact` holds better figures where
    there are any, by the tokens of one sample and the bucket. The pinned bucket goes by `pinning`
    alone, points as well, so that it stays when the others change; by `points` where it's empty.
    """

    points: tuple[tuple[int, float], ...]
    exact: Mapping[tuple[int, int], float] = field(default_factory=dict)
    pinning: tuple[tuple[int, float], ...] = ()

    def seconds(self, tokens: int) -> float:
        """Seconds of a forward pass over `tokens`: linear between points, proportional outside."""
        return _interpolated(self.points, tokens)

    def of(self, tokens: int, bucket: int) -> float:
        """Seconds of a forward pass over a bucket of samples of `tokens` each."""
        known = self.exact.get((tokens, bucket))
        return self.seconds(bucket * tokens) if known is None else known

    def pinned(self, tokens: int) -> int:
        """The bucket of reproducible samples of `tokens` each."""
        points = self.pinning or self.points
        most = PINNED_SLOWDOWN * _interpolated(points, tokens)
        return max((b for b in BUCKETS if _interpolated(points, b * tokens) <= most), default=1)

    def largest(self, tokens: int, share: float = WORTHWHILE) -> int:
        """The smallest bucket with this share of the best throughput: the knee."""
        rates = {b: b / self.of(tokens, b) for b in BUCKETS}
        best = max(rates.values())
        return min(b for b, rate in rates.items() if rate >= share * best)

    def held(self, tokens: int, slots: int = 1) -> int:
        """How many samples of `tokens` each a worker should hold: a forward batch more than run."""
        return max((slots + 1) * max(self.largest(tokens), self.pinned(tokens)), LEAST_HELD)


def _interpolated(points: Sequence[tuple[int, float]], tokens: int) -> float:
    if not points:
        return float(tokens)
    at = bisect_left(points, tokens, key=lambda point: point[0])
    if at in (0, len(points)):
        nearest_tokens, seconds = points[0 if at == 0 else -1]
        return seconds * tokens / nearest_tokens
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


@dataclass(frozen=True, slots=True)
class Passed:
    """Seconds that newer samples ran while one waited: of at least its own work, and of any."""

    equals: float = 0.0
    any: float = 0.0

    def plus(self, other: "Passed", seconds: float) -> "Passed":
        """This, and `seconds` times the shares in `other`."""
        return Passed(self.equals + other.equals * seconds, self.any + other.any * seconds)


NOT_PASSED = Passed()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sample in flight as the scheduler sees it.

    `tokens` is rows x tokens of one forward pass, `steps` all denoising steps and `remaining` those
    to come, `age` seconds since it was asked for, `waited` seconds without a forward pass since it
    became ready. `passed` is the time, in seconds, that it waited while newer samples ran, as
    `overtaken` counts it.
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
    passed: Passed = NOT_PASSED

    @property
    def work(self) -> int:
        """All its work, done and to come, in token-steps."""
        return self.steps * self.tokens


@dataclass(frozen=True, slots=True)
class Forward:
    """The next forward pass: the samples in it, and the bucket that it is padded to."""

    keys: tuple[str, ...]
    bucket: int


Trial = Callable[[int, int, int], int | None]
"""From tokens of a sample, its knee and the most samples: a larger bucket to try now, or None."""


def no_trial(tokens: int, knee: int, most: int) -> None:
    """Tries nothing."""


def choose(
    candidates: Sequence[Candidate],
    costs: Costs,
    ceilings: Mapping[Hashable, int],
    *,
    slots: int = 1,
    running: int = 0,
    busy: Sequence[Candidate] = (),
    trial: Trial = no_trial,
) -> Forward | None:
    """The next forward pass, or None when no sample waits for one.

    `ceilings` holds the groups that ran out of memory, and the most samples they may have. `slots`
    is how many forward passes run at once at most, `running` how many run now, fewer than that,
    and `busy` are the samples in those. `trial` may name a bucket above the knee to be filled for
    once, so that its cost becomes known. It's asked about fast samples only, when enough wait.
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
    alike = [c.key for c in fast if c.tokens == head.tokens][: min(ceiling, share)]
    if len(alike) > knee and (tried := trial(head.tokens, knee, len(alike))):
        return Forward(tuple(alike[:tried]), tried)
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
    gain = count / costs.of(tokens, padded)
    return padded if gain > filled / costs.of(tokens, filled) else filled


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
    overdue = {c.key for c in candidates if is_overdue(c, costs)}

    def urgency(c: Candidate) -> tuple[float, float]:
        return (-1.0, -c.age) if c.key in overdue else (work[c.key], -c.age)

    of_job: Counter[str] = Counter()
    turns: dict[str, int] = {}
    ranked = sorted(candidates, key=lambda c: (*urgency(c), c.key))
    for turn_taker in ranked:
        turns[turn_taker.key] = of_job[turn_taker.job]
        of_job[turn_taker.job] += 1
    in_flight: dict[str, float] = {}
    for c in [*candidates, *busy]:
        in_flight[c.job] = in_flight.get(c.job, 0.0) + work[c.key]

    def place(c: Candidate) -> tuple[float, ...]:
        of_its_job = 0.0 if c.key in overdue else in_flight[c.job]
        return (-_promoted(c), turns[c.key], c.key not in overdue, of_its_job, -c.age)

    return sorted(ranked, key=place)


def overtaken(waiting: Candidate, batch: Sequence[Candidate]) -> Passed:
    """The shares of a forward pass over `batch` that newer samples took from one that waited.

    Samples of higher priority overtake by right and those of its own job don't overtake at all.
    """
    newer = [
        c
        for c in batch
        if c.age < waiting.age and c.priority <= waiting.priority and c.job != waiting.job
    ]
    equals = sum(c.work >= waiting.work for c in newer)
    return Passed(equals / len(batch), len(newer) / len(batch))


def is_overdue(candidate: Candidate, costs: Costs) -> bool:
    """Whether it is late, and newer samples have taken more of its age than they may."""
    passed, age = candidate.passed, candidate.age
    over = passed.equals > PASSED_BY_EQUALS * age or passed.any > PASSED_BY_ANY * age
    return over and is_late(candidate, costs)


def is_late(candidate: Candidate, costs: Costs) -> bool:
    """Whether it can no longer be finished in good time, even if it ran alone from now on."""
    step = costs.of(candidate.tokens, 1)
    return candidate.age + candidate.remaining * step > GOOD_TIME * candidate.steps * step


def _work(candidate: Candidate, costs: Costs) -> float:
    """Seconds of work that count for the order."""
    weight = LATE_WEIGHT if is_late(candidate, costs) else 1.0
    return weight * candidate.remaining * costs.of(candidate.tokens, 1)


def _promoted(candidate: Candidate) -> int:
    return candidate.priority + int(candidate.waited / PROMOTION_SECONDS)
