"""What fits where: which part of a model goes to which device, so that none has too much to hold.

Pure functions over sizes in bytes; loads nothing and asks no device. A part is never lost: one
that fits nowhere is a ConfigurationError with the arithmetic. A part goes whole onto one device if
one has room for its weights and for the activations of an image; else its blocks are dealt over
the devices; else blocks wait on the CPU, and then on the disk, and come to the device each time
they run. Knows no model, only its blocks' names.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from jobs.errors import ConfigurationError

CPU, DISK = "cpu", "disk"
WHOLE = ""
"""The name, in a map of blocks to devices, of a part that is not cut."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s?([KMGT]?)(i?)B", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True, slots=True)
class Part:
    """A component of a pipeline, such as a text encoder: bytes of each block, in order.

    `rest` are the weights outside every block; they go to the device that the part begins on.
    `activations` are what one image takes beside the weights, on each device that runs a block.
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
    """Where a part is: a block's name to its device, "cpu" or "disk"; and where it runs.

    `where` is {"": device} for a part that is not cut. Blocks on the CPU or the disk come to
    `main`, one at a time, when they run: `brought` is the largest of them. `weights` are the bytes
    that each place holds for good.
    """

    part: Part
    where: Mapping[str, str]
    main: str
    weights: Mapping[str, int]
    brought: int = 0

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that run it, the first one first."""
        others = dict.fromkeys(d for d in self.where.values() if d not in (CPU, DISK))
        return (self.main, *(d for d in others if d != self.main))

    @property
    def streamed(self) -> int:
        """Bytes that come to the device in every forward pass."""
        return sum(
            self.part.blocks[name]
            for name, place in self.where.items()
            if place != self.main and place in (CPU, DISK)
        )

    def needs(self) -> dict[str, int]:
        """Bytes that each device must have room for while it runs."""
        return {
            device: self.weights.get(device, 0)
            + self.part.activations
            + (self.brought if device == self.main else 0)
            for device in self.devices
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """Where every part is; `rooms` is what the places had. Stages by name, in running order."""

    stages: Mapping[str, tuple[Spread, ...]]
    rooms: Mapping[str, int] = field(default_factory=dict)

    @property
    def spreads(self) -> dict[str, Spread]:
        """All parts by name."""
        return {s.part.name: s for spreads in self.stages.values() for s in spreads}

    def fit_together(self, names: Iterable[str], running: str) -> bool:
        """Whether the stages' weights fit beside each other while stage `running` runs."""
        return _fits(self.need(names, running), self.rooms)

    def need(self, names: Iterable[str], running: str) -> dict[str, int]:
        """Bytes by device: the weights of the stages, and what stage `running` takes to run."""
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
        raise ConfigurationError(f"{size!r} is no size such as '16GB' or '16GiB'")
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
) -> Plan:
    """Where each stage's parts go. `rooms` are bytes by device, and for "cpu" and "disk".

    Stage `first` chooses first: it is the one that runs at every step. If stages run `in_turn`,
    each may have all the room, but takes what the first one leaves when that suffices, so that
    fewer need unloading; otherwise they share it. Raises ConfigurationError.
    """
    found = _attempt(stages, rooms, first, in_turn, frugal=())
    if not isinstance(found, Plan) and not in_turn:
        found = _attempt(stages, rooms, first, in_turn, frugal=(first,))
    if isinstance(found, Plan):
        return found
    raise _fits_nowhere(*found)


def _attempt(
    stages: Mapping[str, Sequence[Part]],
    rooms: Mapping[str, int],
    first: str,
    in_turn: bool,
    frugal: Sequence[str],
) -> Plan | tuple[Sequence[Part], Mapping[str, int]]:
    """A plan; or the parts of the stage that found no room, and what there was for them.

    The blocks of `frugal` stages wait outside from the beginning, and leave the room to others.
    """
    left = dict(rooms)
    placed: dict[str, tuple[Spread, ...]] = {}
    for name in sorted(stages, key=lambda name: name != first):
        parts = sorted(stages[name], key=lambda part: -part.size)
        room = rooms if in_turn else left
        found = None
        if name not in frugal:
            found = _place_all(parts, left, left, whole=in_turn)
            found = found or _place_all(parts, room, left)
        found = found or _place_all(parts, room, left, frugal=True)
        if found is None:
            return parts, room
        placed[name] = found
        for spread in found:
            for place, size in spread.weights.items():
                left[place] = max(0, left.get(place, 0) - size)
        if not in_turn:  # stages may run at the same time
            for device in left:
                left[device] = max(0, left[device] - _extra(found, device))
    return Plan({name: placed[name] for name in stages}, dict(rooms))


def _place_all(
    parts: Sequence[Part],
    rooms: Mapping[str, int],
    preferred: Mapping[str, int],
    *,
    whole: bool = False,
    frugal: bool = False,
) -> tuple[Spread, ...] | None:
    """The parts of one stage, which are resident together; None when one finds no room.

    With `whole`, none is cut. With `frugal`, every block that may wait outside does.
    """
    left, wish, found = dict(rooms), dict(preferred), []
    for part in parts:
        spread = None if frugal and part.may_be_cut else _whole(part, left, wish)
        if spread is None and not whole:
            spread = _cut(part, left, frugal) if part.may_be_cut else _on_cpu(part, left)
        if spread is None:
            return None
        found.append(spread)
        for place, size in spread.weights.items():
            left[place] = left.get(place, 0) - size
            wish[place] = wish.get(place, 0) - size
    return tuple(found)


def _whole(part: Part, rooms: Mapping[str, int], wish: Mapping[str, int]) -> Spread | None:
    """On the device with room that has most left by `wish`."""
    able = [d for d in _devices(rooms) if part.size + part.activations <= rooms[d]]
    if not able:
        return None
    device = max(able, key=lambda d: wish.get(d, rooms[d]))
    return Spread(part, {WHOLE: device}, device, {device: part.size})


def _on_cpu(part: Part, rooms: Mapping[str, int]) -> Spread | None:
    """A part that cannot be cut runs on the CPU where no device has room."""
    if part.size + part.activations > rooms.get(CPU, 0):
        return None
    return Spread(part, {WHOLE: CPU}, CPU, {CPU: part.size})


def _cut(part: Part, rooms: Mapping[str, int], frugal: bool) -> Spread | None:
    """Blocks over the devices, roomiest first, then on the CPU, then on the disk."""
    devices = sorted(_devices(rooms), key=lambda d: -rooms[d])
    largest = max(part.blocks.values(), default=0)
    tiers = [tier for tier in (CPU, DISK) if tier in rooms and tier not in devices]
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
    """Each block in the first place with room, never going back; None when they run out."""
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
    """What computes: all but the CPU and the disk, or the CPU where there is nothing else."""
    return [place for place in rooms if place not in (CPU, DISK)] or [CPU]


def _extra(spreads: Iterable[Spread], device: str) -> int:
    """What the hungriest of the parts takes on a device beside its weights."""
    takes = [
        s.part.activations + (s.brought if device == s.main else 0)
        for s in spreads
        if device in s.devices
    ]
    return max(takes, default=0)


def _fits(need: Mapping[str, int], rooms: Mapping[str, int]) -> bool:
    return all(size <= rooms.get(device, 0) for device, size in need.items())


def _fits_nowhere(parts: Sequence[Part], rooms: Mapping[str, int]) -> ConfigurationError:
    """One sentence: what the parts of a stage are, and what there is."""
    wants = " and ".join(
        f"{p.name} {in_words(p.size)} of weights"
        + (f" ({in_words(p.rest)} outside its blocks)" if p.may_be_cut else "")
        + f" with {in_words(p.activations)} for an image"
        for p in parts
    )
    places = [p for p in rooms if p != DISK]
    there_is = ", ".join(f"{place} {in_words(max(0, rooms[place]))}" for place in places)
    return ConfigurationError(f"the model fits nowhere: {wants}, but there is left {there_is}")
