"""Which placements of a model fit which devices, with the arithmetic: what `imagemill plan` tells.

Reads configs only; loads no weights and asks no device. Speeds are relations from counted bytes
and floating point operations, never measurements: `LEFT_OUT` says what they do not know.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from jobs.catalog import Model
from jobs.errors import ConfigurationError
from pipelines.acceleration import DENOISERS
from pipelines.checkpoint import Checkpoint
from pipelines.memory import CPU, DISK, WHOLE, Part, Plan, in_words
from pipelines.memory import plan as plan_split
from pipelines.placements.plans import PLANS
from pipelines.placements.stages import CHAINS, split_points
from pipelines.skeleton import DECODE, DENOISE, ENCODE, Image, parts, skeletons, width_of

BACKLOG = 64
"""Images that a worker holds, over which a load of weights is shared."""

LINK = 20e9
"""Bytes a second from the CPU's memory to a device: PCIe 4.0 x16 less its overhead. Assumed."""

COMPUTE = 100e12
"""Operations a second that a device sustains in half precision. Assumed; cards differ tenfold."""

LEFT_OUT = (
    "Speeds are counted, not measured. They leave out kernels' efficiency, what links between "
    "devices cost in time, and the gaps in a small batch; where weights come over a link in every "
    f"forward pass they assume {LINK / 1e9:.0f} GB/s and {COMPUTE / 1e12:.0f} TFLOP/s."
)
ESTIMATE = (
    "Activations are for one image of the entry's default size: values alive at a model's widest "
    "point, 24 a token and channel of a transformer, 27 a latent pixel and channel of a UNet, 3.1 "
    "a pixel and channel of a VAE's second block. These were counted by running real "
    "configurations on the meta device with fused attention; kernels' work space is not in them."
)


@dataclass(frozen=True, slots=True)
class Component:
    """One component's bytes, in the stage that it takes part in."""

    stage: str
    name: str
    weights: int
    activations: int


@dataclass(frozen=True, slots=True)
class Option:
    """One way to place the model. `catalog` are lines for models.toml, None where it cannot be."""

    name: str
    fits: bool
    arithmetic: str
    speed: str = ""
    catalog: str | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """All that is to say about a model on some devices."""

    model: str
    image: str
    devices: tuple[int, ...]
    components: tuple[Component, ...]
    options: tuple[Option, ...]
    notes: tuple[str, ...]


def survey(model: Model, checkpoint: Checkpoint, devices: Sequence[int], cpu: int) -> Survey:
    """Every placement of the model on devices of so many bytes, `cpu` bytes of memory beside them.

    Raises ModelUnavailable, and ConfigurationError when the model fits nowhere.
    """
    modules = skeletons(model, checkpoint)
    if not any(name in modules for name in DENOISERS):
        raise ConfigurationError(f"{checkpoint.class_name} has no {' or '.join(DENOISERS)} to plan")
    case = _Case(model, modules, parts(modules, checkpoint, model), checkpoint, devices, cpu)
    options = tuple(case.options())
    if not any(option.fits for option in options):
        reason = next(option.arithmetic for option in reversed(options) if option.arithmetic)
        raise ConfigurationError(f"{model.name!r} fits nowhere on these devices: {reason}")
    size = f"{model.defaults.width}x{model.defaults.height}"
    rows = " under guidance (2 rows)" if case.image.rows == 2 else ""
    return Survey(
        model=model.name,
        image=f"{size} in {model.dtype}{rows}, {case.image.tokens} image tokens",
        devices=tuple(devices),
        components=tuple(
            Component(stage, p.name, p.size, p.activations)
            for stage, found in case.stages.items()
            for p in found
        ),
        options=options,
        notes=(ESTIMATE, LEFT_OUT),
    )


class _Case:
    """One model on some devices."""

    def __init__(
        self,
        model: Model,
        modules: dict[str, nn.Module],
        stages: dict[str, list[Part]],
        checkpoint: Checkpoint,
        devices: Sequence[int],
        cpu: int,
    ) -> None:
        self.model, self.stages = model, stages
        self.sizes, self.cpu = list(devices), cpu
        self.image = Image(modules, checkpoint, model)
        self.denoiser = stages[DENOISE][0]
        self.kind = type(modules[self.denoiser.name]).__name__
        self.module: Any = modules[self.denoiser.name]
        self.others = sum(p.size for s in (ENCODE, DECODE) for p in stages[s])
        self.total = self.denoiser.size + self.others
        self.peak = {
            s: max((p.activations for p in found), default=0) for s, found in stages.items()
        }
        self.names = [f"cuda:{index}" for index in range(len(devices))]

    def options(self) -> Iterator[Option]:
        """All placements, the simplest first."""
        yield self._replica()
        yield self._split(unload=False)
        yield self._split(unload=True)
        yield from self._context_parallel()
        yield from self._pipelined()

    def _replica(self) -> Option:
        need = self.total + max(self.peak.values())
        able = [name for name, size in zip(self.names, self.sizes, strict=True) if need <= size]
        arithmetic = (
            f"{in_words(self.total)} of weights + {in_words(max(self.peak.values()))} for an image "
            f"= {in_words(need)} on each; {self._has()}"
        )
        if not able:
            return Option("replica", False, arithmetic)
        count = len(able)
        speed = "1x: the measure" if count == 1 else f"{count}x: a worker on each of {count}"
        lines = ['placement = "replica"', f"workers = {count}", f"devices = {_texts(able)}"]
        return Option("replica", True, arithmetic, speed, self._entry("replica", lines))

    def _split(self, unload: bool) -> Option:
        name = "split, unload" if unload else "split"
        rooms = dict(zip(self.names, self.sizes, strict=True)) | {CPU: self.cpu, DISK: 2**62}
        try:
            made = plan_split(self.stages, rooms, first=DENOISE, in_turn=unload)
        except ConfigurationError as error:
            return Option(name, False, str(error))
        limits = [f'"{n}" = "{size / 1e9:g}GB"' for n, size in rooms.items() if n != DISK]
        lines = [
            'placement = "split"',
            f"devices = {_texts(self.names)}",
            f"max_memory = {{ {', '.join(limits)} }}",
            *(["unload = true"] if unload else []),
        ]
        entry = self._entry("split-unload" if unload else "split", lines)
        speed = self._turns(made) if unload else self._at_once(made)
        return Option(name, True, _places(made, unload), speed, entry)

    def _at_once(self, made: Plan) -> str:
        [spread] = made.stages[DENOISE]
        return self._streaming(made) or (
            "1x: one device at a time denoises" if WHOLE not in spread.where else "1x"
        )

    def _turns(self, made: Plan) -> str:
        if all(made.fit_together(made.stages, running=stage) for stage in made.stages):
            return self._streaming(made) or "1x: all stages fit together, none is unloaded"
        loaded = in_words(self.total / BACKLOG)
        once = f"less {loaded} of loading an image in a backlog of {BACKLOG}"
        return f"{self._streaming(made) or '1x'}, {once}"

    def _streaming(self, made: Plan) -> str:
        """What it costs that blocks come to the device in every forward pass; "" if none do."""
        [spread] = made.stages[DENOISE]
        if not spread.streamed:
            return ""
        flops = self._flops()
        if not flops:
            return f"below 1x: {in_words(spread.streamed)} come in every step"
        compute, carry = flops / COMPUTE, spread.streamed / LINK
        return (
            f"{compute / (compute + carry):.2f}x for one image a step: {in_words(spread.streamed)} "
            f"come for {flops / 1e12:.0f} TFLOP"
        )

    def _flops(self) -> float:
        """Of one forward pass for one image; 0 for a UNet, whose tokens differ by level.

        2 a weight and token, and 4 tokens^2 x width for each block's attention (Kaplan et al.,
        arXiv:2001.08361, table 1).
        """
        config = getattr(self.module, "config", {})
        if "block_out_channels" in config:
            return 0.0
        item = next(self.module.parameters()).element_size()
        tokens = self.image.tokens + self.image.text
        weights = 2 * sum(self.denoiser.blocks.values()) / item * tokens
        attention = 4 * tokens**2 * width_of(config) * len(self.denoiser.blocks)
        return float(self.image.rows * (weights + attention))

    def _context_parallel(self) -> Iterator[Option]:
        count, plan = len(self.sizes), PLANS.get(self.kind)
        if count < 2:
            return
        if plan is None:
            yield Option("context_parallel", False, f"{self.kind} has no plan for it")
            return
        for degree in (d for d in (2, 4, 8) if d <= count):
            for way in ("ulysses", "ring"):
                if way == "ulysses" and self.module.config[plan.heads] % degree:
                    continue
                if way == "ring" and plan.mask and self.image.rows == 2:
                    continue  # prompts of two lengths in a pass need a mask, which a ring has not
                yield self._sharded(way, degree)

    def _sharded(self, way: str, degree: int) -> Option:
        share = self.peak[DENOISE] // degree
        leader = self.total + max(share, self.peak[ENCODE], self.peak[DECODE])
        follower = self.denoiser.size + share
        arithmetic = (
            f"leader {in_words(self.total)} + {in_words(leader - self.total)} "
            f"= {in_words(leader)}, "
            f"others {in_words(self.denoiser.size)} + {in_words(share)} = {in_words(follower)}; "
            f"{self._has()}"
        )
        name = f"context_parallel, {way} {degree}"
        order = sorted(range(len(self.sizes)), key=lambda at: -self.sizes[at])[:degree]
        rooms = [self.sizes[at] for at in order]
        if leader > rooms[0] or follower > min(rooms):
            return Option(name, False, arithmetic)
        speed = f"at most {degree}x for one image; {degree} replicas make more of many"
        ranks = [self.names[at] for at in order]
        lines = [
            'placement = "context_parallel"',
            f"{way} = {degree}",
            f"devices = {_texts(ranks)}",
        ]
        return Option(name, True, arithmetic, speed, self._entry(f"{way}-{degree}", lines))

    def _pipelined(self) -> Iterator[Option]:
        count, chain = len(self.sizes), CHAINS.get(self.kind)
        if count < 2:
            return
        if chain is None:
            yield Option("pipelined", False, f"{self.kind} cannot be cut into stages")
            return
        blocks = [
            size for name, size in self.denoiser.blocks.items() if name.split(".")[0] in chain.lists
        ]
        for stages in (n for n in (2, 4, 8) if n <= min(count, len(blocks))):
            yield self._stages(blocks, stages)

    def _stages(self, blocks: Sequence[int], stages: int) -> Option:
        rest = self.denoiser.size - sum(blocks)
        shares = [sum(blocks[i] for i in r) for r in split_points(blocks, stages, rest)]
        first = self.others + rest + shares[0]
        needs = [first + max(self.peak.values()), *(s + self.peak[DENOISE] for s in shares[1:])]
        order = sorted(range(len(self.sizes)), key=lambda at: -self.sizes[at])[:stages]
        rooms = [self.sizes[at] for at in order]
        arithmetic = f"ranks need {', '.join(map(in_words, needs))}; {self._has()}"
        name = f"pipelined, {stages} stages"
        if any(need > room for need, room in zip(needs, rooms, strict=True)):
            return Option(name, False, arithmetic)
        most = sum(shares) / max(shares)
        speed = f"at most {most:.1f}x with {stages} batches in flight, 1x for a lone image"
        ranks = [self.names[at] for at in order]
        lines = [
            'placement = "pipelined"',
            f"stages = {stages}",
            f"chunks = {stages}",
            f"devices = {_texts(ranks)}",
        ]
        return Option(name, True, arithmetic, speed, self._entry(f"pipelined-{stages}", lines))

    def _has(self) -> str:
        kinds = {size: self.sizes.count(size) for size in sorted(set(self.sizes), reverse=True)}
        return "there is " + " and ".join(f"{n} x {in_words(size)}" for size, n in kinds.items())

    def _entry(self, suffix: str, lines: Sequence[str]) -> str:
        """The table for models.toml, with what the model's own entry says."""
        model, defaults = self.model, self.model.defaults
        kept = [f"path = {_text(model.path)}", f"dtype = {_text(model.dtype)}"]
        for field in ("revision", "variant"):
            if getattr(model, field):
                kept.append(f"{field} = {_text(getattr(model, field))}")
        if model.max_sequence_length:
            kept.append(f"max_sequence_length = {model.max_sequence_length}")
        kept.append(
            f"defaults = {{ width = {defaults.width}, height = {defaults.height}, "
            f"steps = {defaults.steps}, guidance_scale = {defaults.guidance_scale} }}"
        )
        name = f"{model.name}-{suffix}"
        key = _text(name) if "." in name else name  # a dot would make a table within a table
        return "\n".join([f"[models.{key}]", *kept[:2], *lines, *kept[2:]])


def _places(made: Plan, in_turn: bool) -> str:
    """Where each component is, and what each device must hold at most."""
    told = []
    for name, spread in made.spreads.items():
        by_place = ", ".join(f"{in_words(n)} on {p}" for p, n in spread.weights.items() if n)
        whole = WHOLE in spread.where
        told.append(f"{name} on {spread.main}" if whole else f"{name}: {by_place}")
    stay = not in_turn or all(made.fit_together(made.stages, stage) for stage in made.stages)
    needs: dict[str, int] = {}
    for running in made.stages:
        held = list(made.stages) if stay else [running]
        for device, size in made.need(held, running).items():
            needs[device] = max(needs.get(device, 0), size)
    full = ", ".join(f"{d} {in_words(n)} of {in_words(made.rooms[d])}" for d, n in needs.items())
    return f"{'; '.join(told)}. At most: {full}"


def _text(value: str) -> str:
    """A TOML basic string."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _texts(values: Sequence[str]) -> str:
    return f"[{', '.join(map(_text, values))}]"
