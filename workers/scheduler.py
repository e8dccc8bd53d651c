"""Which samples share the next forward pass: pure functions over values.

This module uses no GPU, Redis, clock or model. The engine describes what's in flight, and `choose`
returns the next pass. Samples of one group (one batch key) can share a forward pass. Passes are
padded to a bucket, and the cost of each bucket has been measured (`Costs`).

Order: priority first, raised by waiting. Within a priority, one sample of each job, then a second
of each, and so on, so a large job doesn't hold up a small one. Among those, the job with the least
work in flight goes first (shortest remaining processing time). A late sample's work counts several
times, because it has already missed its target, while on-time samples can still meet theirs. Jobs
with equal work go by age.

That alone would starve late samples while newer ones keep coming. So each sample counts the time
that newer ones ran while it waited (`overtaken`). Once that exceeds a fixed share of a late
sample's age, the sample is overdue. Overdue samples go first within their round, oldest first.
Fairness between callers isn't decided here, but by the queue when images are claimed.

A reproducible sample's bits never depend on how many samples ran with it. If warm-up found that
they'd be the same in any bucket up to some size, it runs in any of those. Otherwise it always runs
in the pinned bucket of its shape, and fast samples can fill the pinned bucket's free places.

A pipeline may run several forward passes at once. `choose` then fills one slot after another: a
group gets the slots that no other group needs, and its fast samples are divided among them.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

BUCKETS = (1, 2, 4, 8, 16, 32)
"""Sizes of a forward batch, in samples."""

PINNED_SLOWDOWN = 1.5
"""The pinned bucket is the largest whose pass takes at most this many times a lone sample's."""

WORTHWHILE = 0.97
"""A bucket is large enough once it reaches this share of the best images per second."""

WORTH_WAITING = 0.9
"""The share for on-time samples: a larger bucket slows all of them down for little throughput."""

GOOD_TIME = 4.0
"""An image is on time if it finishes within this many times the time it would take alone."""

LATE_WEIGHT = 4.0
"""Factor on a late sample's remaining work, so an on-time one up to 4 times as long goes first."""

PASSED_BY_EQUALS = 0.28
"""Share of a late sample's age that newer samples with at least as much work may take.

This limits its latency to about 1 / (1 - 0.28) = 1.4 times that of first come, first served.
"""

PASSED_BY_ANY = 0.9
"""The same for all newer samples, including shorter ones, so they can't starve long ones."""

PROMOTION_SECONDS = 30.0
"""Each wait this long raises a sample's priority by one, as in the queue."""

LEAST_HELD = 8
"""Minimum samples to hold, so a short one can overtake even where batching doesn't pay."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured seconds of one forward pass.

    `points` are (image tokens, seconds) pairs in ascending order of tokens. `exact` overrides them
    for pairs of one sample's tokens and a bucket. `pinning` are the points that decide the pinned
    bucket, so that it doesn't change when the other costs do; if empty, `points` decide it.
    `same_bits` maps `repr` of a group to the bucket up to which a sample has the same bits as
    alone; a group that isn't in it has no such bucket.
    """

    points: tuple[tuple[int, float], ...]
    exact: Mapping[tuple[int, int], float] = field(default_factory=dict)
    pinning: tuple[tuple[int, float], ...] = ()
    same_bits: Mapping[str, int] = field(default_factory=dict)

    def seconds(self, tokens: int) -> float:
        """Seconds of a forward pass over `tokens`: linear between points, proportional outside."""
        return _interpolated(self.points, tokens)

    def of(self, tokens: int, bucket: int) -> float:
        """Seconds of a forward pass over a bucket of samples of `tokens` each."""
        known = self.exact.get((tokens, bucket))
        return self.seconds(bucket * tokens) if known is None else known

    def pinned(self, tokens: int) -> int:
        """The bucket for reproducible samples of `tokens` each."""
        points = self.pinning or self.points
        most = PINNED_SLOWDOWN * _interpolated(points, tokens)
        return max((b for b in BUCKETS if _interpolated(points, b * tokens) <= most), default=1)

    def any_up_to(self, group: Hashable) -> int:
        """The bucket up to which reproducible samples can run in any bucket; 0 if only pinned."""
        return self.same_bits.get(repr(group), 0)

    def largest(self, tokens: int, share: float = WORTHWHILE) -> int:
        """The smallest bucket that reaches `share` of the best throughput: the knee."""
        rates = {b: b / self.of(tokens, b) for b in BUCKETS}
        best = max(rates.values())
        return min(b for b, rate in rates.items() if rate >= share * best)

    def held(self, tokens: int, slots: int = 1) -> int:
        """How many samples of `tokens` each a worker should hold: one batch more than it runs."""
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
    """Seconds that newer samples ran while one waited.

    `equals` counts only newer samples with at least as much work, `any` all of them.
    """

    equals: float = 0.0
    any: float = 0.0

    def plus(self, other: "Passed", seconds: float) -> "Passed":
        """Add `seconds` times the shares in `other`."""
        return Passed(self.equals + other.equals * seconds, self.any + other.any * seconds)


NOT_PASSED = Passed()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sample in flight as the scheduler sees it.

    `tokens` is rows x tokens of one forward pass. `steps` is the total number of denoising steps
    and `remaining` how many are left. `age` is seconds since the request, `waited` seconds without
    a forward pass since it became ready. `passed` is the seconds it waited while newer samples ran,
    as counted by `overtaken`.
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
        """Total work, done and remaining, in token-steps."""
        return self.steps * self.tokens


@dataclass(frozen=True, slots=True)
class Forward:
    """The next forward pass: its samples, and the bucket that it's padded to."""

    keys: tuple[str, ...]
    bucket: int


Trial = Callable[[int, int, int], int | None]
"""Takes a sample's tokens, its knee and the most samples; returns a bucket to try, or None."""


def no_trial(tokens: int, knee: int, most: int) -> None:
    """Never try a larger bucket."""


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
    """Return the next forward pass, or None if no sample is waiting for one.

    `ceilings` maps groups that ran out of memory to the most samples they may have. `slots` is the
    maximum number of concurrent forward passes, `running` how many are running now (fewer than
    `slots`), and `busy` the samples in those. `trial` can name a bucket above the knee to fill
    once, so its cost becomes known. It's only called for fast samples, and only if enough wait.
    """
    if not candidates:
        return None
    order = in_order(candidates, costs, busy)
    head = order[0]
    group = [c for c in order if c.group == head.group]
    ceiling = ceilings.get(head.group, BUCKETS[-1])
    any_up_to = costs.any_up_to(head.group)
    if head.reproducible and not any_up_to:
        # Always the pinned bucket, even if nearly empty: another size could change the bits.
        bucket = min(costs.pinned(head.tokens), ceiling)
        return Forward(tuple(c.key for c in group[:bucket]), bucket)
    # A late head has already missed its target, so throughput is all that's left to gain. For an
    # on-time one, a smaller bucket keeps the latency of every step down.
    worth = WORTHWHILE if is_late(head, costs) else WORTH_WAITING
    knee = costs.largest(head.tokens, worth)
    largest = min(knee, ceiling)
    if head.reproducible or sum(not c.reproducible for c in group) <= any_up_to:
        largest = min(largest, any_up_to)

    def takes(c: Candidate, bucket: int) -> bool:
        return c.group == head.group and (bucket <= any_up_to or not c.reproducible)

    flexible = [c for c in group if takes(c, largest)]
    busy_alike = sum(takes(c, largest) for c in busy)
    share = _share(flexible, busy_alike, candidates, busy, slots, slots - running)
    if takes(head, 2 * knee):
        # Trials need samples of one size, because a mixed pass doesn't give the cost of either.
        alike = [c.key for c in group if takes(c, 2 * knee) and c.tokens == head.tokens]
        most = min(len(alike), ceiling, share)
        if most > knee and (tried := trial(head.tokens, knee, most)):
            return Forward(tuple(alike[:tried]), tried)
    # The knee was measured for the head's size, so samples of other sizes count by their tokens.
    members = _within(flexible[: min(largest, share)], knee * head.tokens)
    bucket = _bucket(len(members), head.tokens, costs, largest)
    return Forward(tuple(c.key for c in members[:bucket]), bucket)


def _within(members: Sequence[Candidate], tokens: int) -> Sequence[Candidate]:
    """The first member, and those after it as long as the total stays within `tokens`."""
    totals = accumulate(c.tokens for c in members)
    fitting = sum(total <= tokens for total in totals)
    return members[: max(1, fitting)]


def _bucket(count: int, tokens: int, costs: Costs, largest: int) -> int:
    """The bucket for `count` samples: a full one or a padded one, whichever is faster per image."""
    filled = max(b for b in BUCKETS if b <= count)
    padded = min(b for b in BUCKETS if b >= count)
    if padded > largest:
        return filled
    gain = count / costs.of(tokens, padded)
    return padded if gain > filled / costs.of(tokens, filled) else filled


def _share(
    flexible: Sequence[Candidate],
    busy_alike: int,
    waiting: Sequence[Candidate],
    busy: Sequence[Candidate],
    slots: int,
    free: int,
) -> int:
    """How many of the group's waiting `flexible` samples, which can run in any bucket, the next
    slot gets. `busy_alike` is how many of the group's flexible samples are running.

    Every free slot should get some, and no slot more than an even part of those in flight. Every
    other group gets a slot of its own, as long as one is left for this group.
    """
    # Two limits, because either alone leaves a slot idle or a batch lopsided. `even` divides all
    # of the group's samples, running ones included, over the slots it can use in the long run:
    # without it, a pass that starts while the rest are busy would take all waiting samples, and
    # the slots freed next would find none. The second limit divides just the waiting samples over
    # the slots that are free now: without it, the first of two free slots could take them all.
    # Groups that run already hold a slot, so only groups that don't still need a free one. At
    # least one slot is always left for this group, or it would never run.
    group = flexible[0].group
    alike = len(flexible) + busy_alike
    running = {c.group for c in busy}
    others = {c.group for c in waiting} - {group}
    even = -(-alike // max(1, slots - len((others | running) - {group})))
    return min(even, -(-len(flexible) // max(1, free - len(others - running))))


def in_order(
    candidates: Sequence[Candidate], costs: Costs, busy: Sequence[Candidate] = ()
) -> list[Candidate]:
    """All candidates, most urgent first; `busy` samples count as work of their jobs."""
    work = {c.key: _work(c, costs) for c in [*candidates, *busy]}
    overdue = {c.key for c in candidates if is_overdue(c, costs)}

    def urgency(c: Candidate) -> tuple[float, float]:
        return (-1.0, -c.age) if c.key in overdue else (work[c.key], -c.age)

    # Each job's most urgent sample is in round 0, its next one in round 1, and so on. So hundreds
    # of samples of one job can't delay another job's only one, however short they are.
    of_job: Counter[str] = Counter()
    round_of: dict[str, int] = {}
    ranked = sorted(candidates, key=lambda c: (*urgency(c), c.key))
    for c in ranked:
        round_of[c.key] = of_job[c.job]
        of_job[c.job] += 1
    # Jobs rank by their total work, not per sample, because a caller waits for the whole job.
    in_flight: dict[str, float] = {}
    for c in [*candidates, *busy]:
        in_flight[c.job] = in_flight.get(c.job, 0.0) + work[c.key]

    # The round counts more than being overdue. Otherwise a large job whose samples are all overdue
    # would run them all before any other job's first. Overdue samples ignore their job's size and
    # go by age, so the oldest can't be overtaken again.
    def place(c: Candidate) -> tuple[float, ...]:
        of_its_job = 0.0 if c.key in overdue else in_flight[c.job]
        return (-_promoted(c), round_of[c.key], c.key not in overdue, of_its_job, -c.age)

    return sorted(ranked, key=place)


def overtaken(waiting: Candidate, batch: Sequence[Candidate]) -> Passed:
    """The shares of a forward pass over `batch` that newer samples took while `waiting` waited.

    Higher priorities may always overtake, and samples of the same job don't count as overtaking.
    """
    newer = [
        c
        for c in batch
        if c.age < waiting.age and c.priority <= waiting.priority and c.job != waiting.job
    ]
    equals = sum(c.work >= waiting.work for c in newer)
    return Passed(equals / len(batch), len(newer) / len(batch))


def is_overdue(candidate: Candidate, costs: Costs) -> bool:
    """Whether it's late, and newer samples have taken more than their share of its age."""
    # Shares of the age, not fixed seconds, so the bound scales with load: under a long backlog
    # every sample is old, and a fixed limit would make all of them overdue, which is first come,
    # first served. Longer newer samples get a smaller share than shorter ones, because letting a
    # short one pass costs little and lowers the mean latency, whereas an equal one gains nothing.
    passed, age = candidate.passed, candidate.age
    over = passed.equals > PASSED_BY_EQUALS * age or passed.any > PASSED_BY_ANY * age
    return over and is_late(candidate, costs)


def is_late(candidate: Candidate, costs: Costs) -> bool:
    """Whether it can't finish on time any more, even if it ran alone from now on."""
    step = costs.of(candidate.tokens, 1)
    return candidate.age + candidate.remaining * step > GOOD_TIME * candidate.steps * step


def _work(candidate: Candidate, costs: Costs) -> float:
    """Seconds of remaining work, weighted for the order."""
    weight = LATE_WEIGHT if is_late(candidate, costs) else 1.0
    return weight * candidate.remaining * costs.of(candidate.tokens, 1)


def _promoted(candidate: Candidate) -> int:
    return candidate.priority + int(candidate.waited / PROMOTION_SECONDS)
