"""Work out which placements of a model fit which devices: the report of `imagemill plan`.

Reads configs only; no weights are loaded and no device is queried. Speeds are ratios computed from
counted bytes and floating point operations, not measurements; `LEFT_OUT` lists what they ignore.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jobs.catalog import Model
from jobs.defaults import with_own_defaults
from jobs.errors import ConfigurationError
from jobs.options import LAYOUT, check_options
from pipelines.families import is_stepped
from pipelines.loading.checkpoint import Checkpoint
from pipelines.loading.components import DENOISERS
from pipelines.loading.defaults import own_defaults
from pipelines.loading.quantization import check_quantization, schemes, stored_method
from pipelines.planner.case import Case, Option, texts
from pipelines.planner.groups import context_parallel_options, pipelined_options
from pipelines.planner.memory import CPU, DISK, WHOLE, MemoryPlan, Spread, in_words
from pipelines.planner.memory import plan as plan_split
from pipelines.planner.skeleton import DENOISE, parts, skeletons, width_of
from pipelines.seam import ROUND

BACKLOG = ROUND
"""Images that share one load of the weights: as many as a worker holds."""

MEMORY_LINK = 8e9
"""Bytes per second from the CPU's pageable memory to a device. An assumption: PCIe 4.0 x16 carries
25e9 from pinned memory, but pageable memory first goes through a buffer of the driver."""

DISK_LINK = 3e9
"""Bytes per second from the disk to a device. An assumption: an NVMe disk reads 5e9, and then the
data is copied to the device. A network disk is slower, the kernel's page cache faster."""

COMPUTE = 100e12
"""Operations per second that a device sustains in half precision. An assumption: cards differ
tenfold."""

LEFT_OUT = (
    "Speeds are calculated, not measured. They ignore how efficient kernels are, the time that "
    "transfers between devices take, and idle time in small batches. If weights cross a link in "
    f"every forward pass, they assume {MEMORY_LINK / 1e9:.0f} GB/s from memory, "
    f"{DISK_LINK / 1e9:.0f} GB/s from the disk and {COMPUTE / 1e12:.0f} TFLOP/s."
)
ESTIMATE = (
    "Activations are for one image of the entry's default size: the values alive at a model's "
    "widest point, 24 per token and channel of a transformer, 27 per latent pixel and channel of a "
    "UNet, 3.1 per pixel and channel of a VAE's second block. These were counted by running real "
    "configurations on the meta device with fused attention. They don't include kernels' "
    "workspaces."
)


@dataclass(frozen=True, slots=True)
class Component:
    """One component's bytes, and the stage it runs in.

    `kind` is the format of its weights: the entry's dtype, or a quantization such as `int8`, `Q4_0`
    or `nf4`.
    """

    stage: str
    name: str
    kind: str
    weights: int
    activations: int


@dataclass(frozen=True, slots=True)
class Survey:
    """The report about a model on some devices. `use` is the advice in one line."""

    model: str
    image: str
    devices: tuple[int, ...]
    components: tuple[Component, ...]
    options: tuple[Option, ...]
    notes: tuple[str, ...]
    use: str


def survey(model: Model, checkpoint: Checkpoint, devices: Sequence[int], cpu: int) -> Survey:
    """Try every placement of the model on devices with these sizes and `cpu` bytes of CPU memory.

    Raises the error with which a worker would refuse the model (ModelUnavailable or
    ConfigurationError), and ConfigurationError if no placement fits.
    """
    if model.unset:
        model = with_own_defaults(model, own_defaults(model, checkpoint))
    name = checkpoint.class_name
    check_options(None, model.options - set(LAYOUT), name, is_stepped(name))
    check_quantization(model, checkpoint)
    modules = skeletons(model, checkpoint)
    if not any(name in modules for name in DENOISERS):
        raise ConfigurationError(f"{checkpoint.class_name} has no {' or '.join(DENOISERS)} to plan")
    case = Case(model, modules, parts(modules, checkpoint, model), checkpoint, devices, cpu)
    options = tuple(_options(case))
    if not any(option.fits for option in options):
        reason = next(option.arithmetic for option in reversed(options) if option.arithmetic)
        raise ConfigurationError(f"{model.name!r} doesn't fit on these devices: {reason}")
    kinds = kinds_of(model, checkpoint)
    size = f"{model.defaults.width}x{model.defaults.height}"
    rows = " under guidance (2 rows)" if case.image.rows == 2 else ""
    return Survey(
        model=model.name,
        image=f"{size} in {model.dtype}{rows}, {case.image.tokens} image tokens",
        devices=tuple(devices),
        components=tuple(
            Component(stage, p.name, kinds.get(p.name, model.dtype), p.size, p.activations)
            for stage, stage_parts in case.stages.items()
            for p in stage_parts
        ),
        options=options,
        notes=(ESTIMATE, LEFT_OUT),
        use=advice(options),
    )


def advice(options: Sequence[Option]) -> str:
    """Recommend the simplest option that fits with the fewest weights (ideally 0) over a link."""
    best = min((option for option in options if option.fits), key=lambda option: option.streams)
    if best.streams:
        return (
            f"Use {best.name}: every option that fits copies weights to the device in each forward "
            f"pass, and this one copies the least, {in_words(best.streams)}."
        )
    return f"Use {best.name}: {WHY.get(best.name) or WHY[best.name.partition(',')[0]]}."


WHY = {
    "replica": "the whole model fits on one device, and each device makes images of its own",
    "split": "the whole model fits on the devices together",
    "split, unload": "the model fits if its stages are loaded in turn",
    "context_parallel": "the model fits only if the devices split each image",
    "pipelined": "the model fits only if the devices split its blocks",
}
"""Placement -> the reason to use it when the placements before it don't fit."""


def kinds_of(model: Model, checkpoint: Checkpoint) -> dict[str, str]:
    """Component -> format of its weights, for quantized components."""
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
        case.model_for("replica")
    except ConfigurationError as error:
        return Option("replica", False, str(error))
    need = case.total + max(case.peak.values())
    roomy = [name for name, size in zip(case.names, case.sizes, strict=True) if need <= size]
    arithmetic = (
        f"{in_words(case.total)} of weights + {in_words(max(case.peak.values()))} for an image "
        f"= {in_words(need)} on each; {case.has()}"
    )
    if not roomy:
        return Option("replica", False, arithmetic)
    count = len(roomy)
    speed = "1x: the baseline" if count == 1 else f"{count}x: one worker on each of {count}"
    lines = ['placement = "replica"', f"workers = {count}", f"devices = {texts(roomy)}"]
    return Option("replica", True, arithmetic, speed, case.entry("replica", lines))


def _split(case: Case, unload: bool) -> Option:
    name = "split, unload" if unload else "split"
    rooms = dict(zip(case.names, case.sizes, strict=True)) | {CPU: case.cpu, DISK: 2**62}
    try:
        case.model_for("split", unload=unload)
        layout = plan_split(case.stages, rooms, first=DENOISE, in_turn=unload)
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
    speed = _unload_speed(case, layout) if unload else _split_speed(case, layout)
    streams = sum(spread.streamed for spread in layout.spreads.values())
    return Option(name, True, _places(layout, unload), speed, entry, streams)


def _split_speed(case: Case, layout: MemoryPlan) -> str:
    [spread] = layout.stages[DENOISE]
    return _streaming_speed(case, layout) or (
        "1x: one device at a time denoises" if WHOLE not in spread.where else "1x"
    )


def _unload_speed(case: Case, layout: MemoryPlan) -> str:
    if all(layout.fit_together(layout.stages, running=stage) for stage in layout.stages):
        return _streaming_speed(case, layout) or "1x: all stages fit together, none is unloaded"
    loaded = in_words(case.total / BACKLOG)
    overhead = f"minus loading {loaded} per image with a backlog of {BACKLOG}"
    return f"{_streaming_speed(case, layout) or '1x'}, {overhead}"


def _streaming_speed(case: Case, layout: MemoryPlan) -> str:
    """The speed if blocks are copied to the device in every forward pass; "" if none are."""
    [spread] = layout.stages[DENOISE]
    if not spread.streamed:
        return ""
    flops, read = _flops(case), _bytes_at(spread, DISK)
    copied = f"{in_words(spread.streamed)} copied"
    if not flops:
        return f"below 1x: {copied} in every step"
    compute = flops / COMPUTE
    transfer = (spread.streamed - read) / MEMORY_LINK + read / DISK_LINK
    from_disk = f", {in_words(read)} of them from the disk" if read else ""
    return (
        f"{compute / (compute + transfer):.2f}x for one image per step: {copied} for "
        f"{flops / 1e12:.0f} TFLOP{from_disk}"
    )


def _bytes_at(spread: Spread, place: str) -> int:
    """Bytes of the blocks stored at a place."""
    return sum(spread.part.blocks[name] for name, at in spread.where.items() if at == place)


def _flops(case: Case) -> float:
    """Operations of one forward pass for one image; 0 for a UNet, whose levels differ in tokens.

    2 per weight and token, plus 4 tokens^2 x width per block for attention (Kaplan et al.,
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


def _places(layout: MemoryPlan, in_turn: bool) -> str:
    """Where each component is, and the most that each device has to hold."""
    places = []
    for name, spread in layout.spreads.items():
        by_place = ", ".join(f"{in_words(n)} on {p}" for p, n in spread.weights.items() if n)
        whole = WHOLE in spread.where
        places.append(f"{name} on {spread.main}" if whole else f"{name}: {by_place}")
    stay = not in_turn or all(layout.fit_together(layout.stages, s) for s in layout.stages)
    needs: dict[str, int] = {}
    for running in layout.stages:
        loaded = list(layout.stages) if stay else [running]
        for device, size in layout.need(loaded, running).items():
            needs[device] = max(needs.get(device, 0), size)
    peak = ", ".join(f"{d} {in_words(n)} of {in_words(layout.rooms[d])}" for d, n in needs.items())
    return f"{'; '.join(places)}. Peak: {peak}"
