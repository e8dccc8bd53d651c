"""Which placements of a model fit which devices, with the arithmetic: what `imagemill plan` tells.

Reads configs only; loads no weights and asks no device. Speeds are relations from counted bytes
and floating point operations, never measurements: `LEFT_OUT` says what they do not know.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from jobs.catalog import Model
from jobs.defaults import with_own_defaults
from jobs.errors import ConfigurationError
from pipelines.loading.checkpoint import Checkpoint
from pipelines.loading.components import DENOISERS
from pipelines.loading.defaults import own_defaults
from pipelines.loading.quantization import check_quantization, schemes, stored_method
from pipelines.placements.replica import check_replica
from pipelines.placements.split import check_split
from pipelines.planner.case import Case, Option, texts
from pipelines.planner.groups import context_parallel_options, pipelined_options
from pipelines.planner.memory import CPU, DISK, WHOLE, Plan, Spread, in_words
from pipelines.planner.memory import plan as plan_split
from pipelines.planner.skeleton import DENOISE, parts, skeletons, width_of
from pipelines.seam import ROUND

BACKLOG = ROUND
"""Images over which a load of weights is shared: what a worker holds."""

MEMORY_LINK = 8e9
"""Bytes a second from the CPU's pageable memory to a device. Assumed: PCIe 4.0 x16 carries 25e9
from pinned memory; what is not pinned goes through a buffer of the driver's first."""

DISK_LINK = 3e9
"""Bytes a second from the disk to a device. Assumed: an NVMe disk that reads 5e9, and then the copy
of what was read. A network disk is slower; what the kernel still has in memory comes faster."""

COMPUTE = 100e12
"""Operations a second that a device sustains in half precision. Assumed; cards differ tenfold."""

LEFT_OUT = (
    "Speeds are counted, not measured. They leave out kernels' efficiency, what links between "
    "devices cost in time, and the gaps in a small batch; where weights come over a link in every "
    f"forward pass they assume {MEMORY_LINK / 1e9:.0f} GB/s from memory, "
    f"{DISK_LINK / 1e9:.0f} GB/s from the disk and {COMPUTE / 1e12:.0f} TFLOP/s."
)
ESTIMATE = (
    "Activations are for one image of the entry's default size: values alive at a model's widest "
    "point, 24 a token and channel of a transformer, 27 a latent pixel and channel of a UNet, 3.1 "
    "a pixel and channel of a VAE's second block. These were counted by running real "
    "configurations on the meta device with fused attention; kernels' work space is not in them."
)


@dataclass(frozen=True, slots=True)
class Component:
    """One component's bytes, in the stage that it takes part in.

    `kind` is how its weights are held: the entry's dtype, or such as `int8`, `Q4_0` and `nf4`.
    """

    stage: str
    name: str
    kind: str
    weights: int
    activations: int


@dataclass(frozen=True, slots=True)
class Survey:
    """All that is to say about a model on some devices. `use` is the advice, in one line."""

    model: str
    image: str
    devices: tuple[int, ...]
    components: tuple[Component, ...]
    options: tuple[Option, ...]
    notes: tuple[str, ...]
    use: str


def survey(model: Model, checkpoint: Checkpoint, devices: Sequence[int], cpu: int) -> Survey:
    """Every placement of the model on devices of so many bytes, `cpu` bytes of memory beside them.

    Raises what a worker would refuse the model with, ModelUnavailable or ConfigurationError, and
    ConfigurationError when the model fits nowhere.
    """
    if model.unset:
        model = with_own_defaults(model, own_defaults(model, checkpoint))
    check_quantization(model, checkpoint)
    modules = skeletons(model, checkpoint)
    if not any(name in modules for name in DENOISERS):
        raise ConfigurationError(f"{checkpoint.class_name} has no {' or '.join(DENOISERS)} to plan")
    case = Case(model, modules, parts(modules, checkpoint, model), checkpoint, devices, cpu)
    options = tuple(_options(case))
    if not any(option.fits for option in options):
        reason = next(option.arithmetic for option in reversed(options) if option.arithmetic)
        raise ConfigurationError(f"{model.name!r} fits nowhere on these devices: {reason}")
    kinds = kinds_of(model, checkpoint)
    size = f"{model.defaults.width}x{model.defaults.height}"
    rows = " under guidance (2 rows)" if case.image.rows == 2 else ""
    return Survey(
        model=model.name,
        image=f"{size} in {model.dtype}{rows}, {case.image.tokens} image tokens",
        devices=tuple(devices),
        components=tuple(
            Component(stage, p.name, kinds.get(p.name, model.dtype), p.size, p.activations)
            for stage, found in case.stages.items()
            for p in found
        ),
        options=options,
        notes=(ESTIMATE, LEFT_OUT),
        use=advice(options),
    )


def advice(options: Sequence[Option]) -> str:
    """What to use: the simplest that fits with the fewest weights, or none, over a link."""
    best = min((option for option in options if option.fits), key=lambda option: option.streams)
    if best.streams:
        return (
            f"Use {best.name}: nothing fits without weights that come over the link in every pass, "
            f"and here they are fewest, {in_words(best.streams)}."
        )
    return f"Use {best.name}: {WHY.get(best.name) or WHY[best.name.partition(',')[0]]}."


WHY = {
    "replica": "the model fits a device whole, and each device makes images of its own",
    "split": "the devices hold all of it together",
    "split, unload": "the devices hold its stages in turn",
    "context_parallel": "it fits only where the devices share each image out",
    "pipelined": "it fits only where the devices share its blocks out",
}
"""Placement -> the reason to use it where those before it don't fit."""


def kinds_of(model: Model, checkpoint: Checkpoint) -> dict[str, str]:
    """How the weights of quantized components are held, by name."""
    stored = {name: stored_method(checkpoint.source(name)) for name in checkpoint.components}
    return {name: kind for name, kind in stored.items() if kind} | schemes(model, checkpoint)


def _options(case: Case) -> Iterator[Option]:
    """All placements, the simplest first."""
    yield _replica(case)
    yield _split(case, unload=False)
    yield _split(case, unload=True)
    yield from context_parallel_options(case)
    yield from pipelined_options(case)


def _replica(case: Case) -> Option:
    try:
        check_replica(case.model, case.checkpoint)
    except ConfigurationError as error:
        return Option("replica", False, str(error))
    need = case.total + max(case.peak.values())
    able = [name for name, size in zip(case.names, case.sizes, strict=True) if need <= size]
    arithmetic = (
        f"{in_words(case.total)} of weights + {in_words(max(case.peak.values()))} for an image "
        f"= {in_words(need)} on each; {case.has()}"
    )
    if not able:
        return Option("replica", False, arithmetic)
    count = len(able)
    speed = "1x: the measure" if count == 1 else f"{count}x: a worker on each of {count}"
    lines = ['placement = "replica"', f"workers = {count}", f"devices = {texts(able)}"]
    return Option("replica", True, arithmetic, speed, case.entry("replica", lines))


def _split(case: Case, unload: bool) -> Option:
    name = "split, unload" if unload else "split"
    rooms = dict(zip(case.names, case.sizes, strict=True)) | {CPU: case.cpu, DISK: 2**62}
    try:
        entry_model = replace(case.model, placement="split", unload=unload)
        check_split(entry_model, case.checkpoint)
        made = plan_split(case.stages, rooms, first=DENOISE, in_turn=unload)
    except ConfigurationError as error:
        return Option(name, False, str(error))
    limits = [f'"{n}" = "{size / 1e9:g}GB"' for n, size in rooms.items() if n != DISK]
    lines = [
        'placement = "split"',
        f"devices = {texts(case.names)}",
        f"max_memory = {{ {', '.join(limits)} }}",
        *(["unload = true"] if unload else []),
    ]
    entry = case.entry("split-unload" if unload else "split", lines)
    speed = _turns(case, made) if unload else _at_once(case, made)
    streams = sum(spread.streamed for spread in made.spreads.values())
    return Option(name, True, _places(made, unload), speed, entry, streams)


def _at_once(case: Case, made: Plan) -> str:
    [spread] = made.stages[DENOISE]
    return _streaming(case, made) or (
        "1x: one device at a time denoises" if WHOLE not in spread.where else "1x"
    )


def _turns(case: Case, made: Plan) -> str:
    if all(made.fit_together(made.stages, running=stage) for stage in made.stages):
        return _streaming(case, made) or "1x: all stages fit together, none is unloaded"
    loaded = in_words(case.total / BACKLOG)
    once = f"less {loaded} of loading an image in a backlog of {BACKLOG}"
    return f"{_streaming(case, made) or '1x'}, {once}"


def _streaming(case: Case, made: Plan) -> str:
    """What it costs that blocks come to the device in every forward pass; "" if none do."""
    [spread] = made.stages[DENOISE]
    if not spread.streamed:
        return ""
    flops, read = _flops(case), _bytes_at(spread, DISK)
    come = f"{in_words(spread.streamed)} come"
    if not flops:
        return f"below 1x: {come} in every step"
    compute = flops / COMPUTE
    carry = (spread.streamed - read) / MEMORY_LINK + read / DISK_LINK
    from_disk = f", {in_words(read)} of them from the disk" if read else ""
    return (
        f"{compute / (compute + carry):.2f}x for one image a step: {come} for "
        f"{flops / 1e12:.0f} TFLOP{from_disk}"
    )


def _bytes_at(spread: Spread, place: str) -> int:
    """Bytes of the blocks that wait there."""
    return sum(spread.part.blocks[name] for name, at in spread.where.items() if at == place)


def _flops(case: Case) -> float:
    """Of one forward pass for one image; 0 for a UNet, whose tokens differ by level.

    2 a weight and token, and 4 tokens^2 x width for each block's attention (Kaplan et al.,
    arXiv:2001.08361, table 1).
    """
    config = getattr(case.module, "config", {})
    if "block_out_channels" in config:
        return 0.0
    item = next(case.module.parameters()).element_size()
    tokens = case.image.tokens + case.image.text
    weights = 2 * sum(case.denoiser.blocks.values()) / item * tokens
    attention = 4 * tokens**2 * width_of(config) * len(case.denoiser.blocks)
    return float(case.image.rows * (weights + attention))


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
