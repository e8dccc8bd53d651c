"""Decide which part of a model goes to which device, so that everything fits.

Pure functions over sizes in bytes: nothing is loaded and no device is queried. A part that doesn't
fit raises ConfigurationError with the arithmetic. A part goes whole onto one device if there's room
for its weights and the activations of an image. Otherwise its blocks are spread over the devices.
If that isn't enough, blocks stay on the CPU, then on the disk, and are copied to the device each
time they run. Of a model, only the names of its blocks are used.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from jobs.errors import ConfigurationError

CPU, DISK = "cpu", "disk"
WHOLE = ""
"""The key, in a map of blocks to devices, for a part that isn't cut."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s?([KMGT]?)(i?)B", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True, slots=True)
class Part:
    """A component of a pipeline, such as a text encoder: the bytes of each block, in order.

    `rest` is the weights outside all blocks; they go to the device where the part starts.
    `activations` is what one image needs in addition to the weights, on each device that runs a
    block.
    """

    name: str
    blocks: Mapping[str, int]
    rest: int = 0
    activations: int = 0
    may_be_cut: bool = True

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(self.blocks.values()) + self.rest


@dataclass(frozen=True, slots=True)
class Spread:
    """Where a part's blocks are stored (a device, "cpu" or "disk"), and where it runs.

    `where` maps block names to places; it's {"": device} for a part that isn't cut. Blocks on the
    CPU or the disk are copied to `main` one at a time when they run; `brought` is the size of the
    largest one. `weights` is the bytes that stay at each place.
    """

    part: Part
    where: Mapping[str, str]
    main: str
    weights: Mapping[str, int]
    brought: int = 0

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that run it, the main one first."""
        others = dict.fromkeys(d for d in self.where.values() if d not in (CPU, DISK))
        return (self.main, *(d for d in others if d != self.main))

    @property
    def streamed(self) -> int:
        """Bytes copied to the device in every forward pass."""
        return sum(
            self.part.blocks[name]
            for name, place in self.where.items()
            if place != self.main and place in (CPU, DISK)
        )

    def needs(self) -> dict[str, int]:
        """Bytes that each device needs while the part runs."""
        return {
            device: self.weights.get(device, 0)
            + self.part.activations
            + (self.brought if device == self.main else 0)
            for device in self.devices
        }


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where every part is, by stage in running order. `rooms` is the bytes that each place had."""

    stages: Mapping[str, tuple[Spread, ...]]
    rooms: Mapping[str, int] = field(default_factory=dict)

    @property
    def spreads(self) -> dict[str, Spread]:
        """All parts by name."""
        return {s.part.name: s for spreads in self.stages.values() for s in spreads}

    def fit_together(self, names: Iterable[str], running: str) -> bool:
        """Whether the weights of all these stages fit while stage `running` runs."""
        return _fits(self.need(names, running), self.rooms)

    def need(self, names: Iterable[str], running: str) -> dict[str, int]:
        """Bytes by device: the weights of the stages, plus what stage `running` needs to run."""
        total: dict[str, int] = {}
        for name in dict.fromkeys(names):
            for spread in self.stages[name]:
                for device in spread.devices:
                    total[device] = total.get(device, 0) + spread.weights.get(device, 0)
        for device in {d for s in self.stages[running] for d in s.devices}:
            total[device] = total.get(device, 0) + _extra(self.stages[running], device)
        return total


def bytes_of(size: str | int) -> int:
    """A size such as "16GB" (10^9) or "16GiB" (2^30) in bytes. Raises ConfigurationError."""
    if isinstance(size, int):
        return size
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise ConfigurationError(
            f"invalid size {size!r}: expected something like '16GB' or '16GiB'"
        )
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** _POWERS[match[2].upper()])


def in_words(size: float) -> str:
    """`23.8 GB`, `1.2 MB`, in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if size < 999.95:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def plan(
    stages: Mapping[str, Sequence[Part]],
    rooms: Mapping[str, int],
    *,
    first: str,
    in_turn: bool,
) -> MemoryPlan:
    """Place each stage's parts. `rooms` is the bytes per device, and for "cpu" and "disk".

    Stage `first` is placed first, because it runs at every step. With `in_turn`, the stages run one
    at a time, so each may use all the room. They still prefer the room that the first one leaves,
    so that fewer have to be unloaded. Otherwise the stages share the room. Raises
    ConfigurationError.
    """
    result = _attempt(stages, rooms, first, in_turn, frugal=())
    if not isinstance(result, MemoryPlan) and not in_turn:
        # The first stage took all the room. It can stream its blocks; a VAE, say, can't.
        result = _attempt(stages, rooms, first, in_turn, frugal=(first,))
    if isinstance(result, MemoryPlan):
        return result
    raise _does_not_fit(*result)


def _attempt(
    stages: Mapping[str, Sequence[Part]],
    rooms: Mapping[str, int],
    first: str,
    in_turn: bool,
    frugal: Sequence[str],
) -> MemoryPlan | tuple[Sequence[Part], Mapping[str, int]]:
    """A plan; or the parts of the stage that didn't fit, and the room there was for them.

    The blocks of `frugal` stages are streamed even if they'd fit, to leave the room to others.
    """
    left = dict(rooms)
    layout: dict[str, tuple[Spread, ...]] = {}
    for name in sorted(stages, key=lambda name: name != first):
        parts = sorted(stages[name], key=lambda part: -part.size)
        room = rooms if in_turn else left
        spreads = None
        if name not in frugal:
            spreads = _place_all(parts, left, left, whole=in_turn)
            spreads = spreads or _place_all(parts, room, left)
        spreads = spreads or _place_all(parts, room, left, frugal=True)
        if spreads is None:
            return parts, room
        layout[name] = spreads
        for spread in spreads:
            for place, size in spread.weights.items():
                left[place] = max(0, left.get(place, 0) - size)
        if not in_turn:  # stages may run at the same time
            for device in left:
                left[device] = max(0, left[device] - _extra(spreads, device))
    return MemoryPlan({name: layout[name] for name in stages}, dict(rooms))


def _place_all(
    parts: Sequence[Part],
    rooms: Mapping[str, int],
    preferred: Mapping[str, int],
    *,
    whole: bool = False,
    frugal: bool = False,
) -> tuple[Spread, ...] | None:
    """Place the parts of one stage, which are loaded together; None if one doesn't fit.

    With `whole`, no part is cut. With `frugal`, every block that can be streamed is.
    """
    left, preference, spreads = dict(rooms), dict(preferred), []
    for part in parts:
        spread = None if frugal and part.may_be_cut else _whole(part, left, preference)
        if spread is None and not whole:
            spread = _cut(part, left, frugal) if part.may_be_cut else _on_cpu(part, left)
        if spread is None:
            return None
        spreads.append(spread)
        for place, size in spread.weights.items():
            left[place] = left.get(place, 0) - size
            preference[place] = preference.get(place, 0) - size
    return tuple(spreads)


def _whole(part: Part, rooms: Mapping[str, int], preference: Mapping[str, int]) -> Spread | None:
    """Place the part on the device that has room and has the most left by `preference`."""
    roomy = [d for d in _devices(rooms) if part.size + part.activations <= rooms[d]]
    if not roomy:
        return None
    device = max(roomy, key=lambda d: preference.get(d, rooms[d]))
    return Spread(part, {WHOLE: device}, device, {device: part.size})


def _on_cpu(part: Part, rooms: Mapping[str, int]) -> Spread | None:
    """Place a part that can't be cut on the CPU, if it fits there."""
    if part.size + part.activations > rooms.get(CPU, 0):
        return None
    return Spread(part, {WHOLE: CPU}, CPU, {CPU: part.size})


def _cut(part: Part, rooms: Mapping[str, int], frugal: bool) -> Spread | None:
    """Spread the blocks over the devices, roomiest first, then the CPU, then the disk."""
    devices = sorted(_devices(rooms), key=lambda d: -rooms[d])
    largest = max(part.blocks.values(), default=0)
    tiers = [tier for tier in (CPU, DISK) if tier in rooms and tier not in devices]
    # A streamed block needs room on the first device while it runs, hence the reserve.
    for places, reserve in ((devices, 0), ([*devices, *tiers], largest)):
        free = {p: rooms[p] - (part.activations if p in devices else 0) for p in places}
        free[devices[0]] -= part.rest + reserve
        if free[devices[0]] < 0 or (frugal and places == devices):
            continue
        where = _fill(part.blocks, {t: free[t] for t in tiers} if frugal else free)
        if where is not None:
            return _spread(part, where, devices[0])
    return None


def _fill(blocks: Mapping[str, int], free: Mapping[str, int]) -> dict[str, str] | None:
    """Put each block in the first place with room, never going back; None if they don't all fit."""
    where: dict[str, str] = {}
    left = dict(free)
    places = iter(free)
    place = next(places, None)
    for name, size in blocks.items():
        while place is not None and size > left[place]:
            place = next(places, None)
        if place is None:
            return None
        left[place] -= size
        where[name] = place
    return where


def _spread(part: Part, where: dict[str, str], main: str) -> Spread:
    weights: dict[str, int] = {main: part.rest}
    for name, place in where.items():
        weights[place] = weights.get(place, 0) + part.blocks[name]
    outside = [part.blocks[n] for n, p in where.items() if p in (CPU, DISK) and p != main]
    return Spread(part, where, main, weights, max(outside, default=0))


def _devices(rooms: Mapping[str, int]) -> list[str]:
    """The places that compute: all but the CPU and the disk, or the CPU if it's the only one."""
    return [place for place in rooms if place not in (CPU, DISK)] or [CPU]


def _extra(spreads: Iterable[Spread], device: str) -> int:
    """The most that any of the parts needs on a device in addition to its weights."""
    needs = [
        s.part.activations + (s.brought if device == s.main else 0)
        for s in spreads
        if device in s.devices
    ]
    return max(needs, default=0)


def _fits(need: Mapping[str, int], rooms: Mapping[str, int]) -> bool:
    return all(size <= rooms.get(device, 0) for device, size in need.items())


def _does_not_fit(parts: Sequence[Part], rooms: Mapping[str, int]) -> ConfigurationError:
    """The error with the sizes of a stage's parts and the room that's left."""
    needs = " and ".join(
        f"{p.name} needs {in_words(p.size)} of weights"
        + (f" ({in_words(p.rest)} outside its blocks)" if p.may_be_cut else "")
        + f" and {in_words(p.activations)} for an image"
        for p in parts
    )
    places = [p for p in rooms if p != DISK]
    left = ", ".join(f"{place} {in_words(max(0, rooms[place]))}" for place in places)
    return ConfigurationError(f"the model doesn't fit: {needs}, but there's only {left}")
