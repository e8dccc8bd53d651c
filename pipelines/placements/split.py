"""Split: a model over several devices, or its stages in turn on a device that's too small for all.

The plan (`pipelines.planner.memory`) says where each component goes. With `unload`, the stages
(text encoders, denoiser, VAE) take turns. Each is loaded when it's first needed, or in the
background if it fits next to the running one, and unloaded when another needs the memory. If a
backlog is served phase by phase, each stage is loaded once for all of it. Has no code for
particular models.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import structlog
import torch

from jobs.catalog import Model
from jobs.errors import ConfigurationError
from pipelines.acceleration import compile_blocks, denoiser_of, run_once
from pipelines.attention import choose_attention
from pipelines.device import use_device
from pipelines.families import make_family
from pipelines.families.family import Family, Role
from pipelines.loading.checkpoint import Checkpoint
from pipelines.loading.quantization import check_quantization, quantizers, stored_method
from pipelines.out_of_memory import is_out_of_memory
from pipelines.placements.family_pipeline import FamilyPipeline
from pipelines.placements.residence import Residence, release_memory
from pipelines.placements.stage_loader import StageLoader
from pipelines.placements.verify import compare, record, trials
from pipelines.planner.host_memory import available_memory
from pipelines.planner.memory import CPU, DISK, WHOLE, MemoryPlan, bytes_of, in_words, plan
from pipelines.planner.skeleton import DECODE, DENOISE, ENCODE, STAGES, parts, skeletons
from pipelines.seam import Conditioning, Sample

T = TypeVar("T")

SPARE = 0.95
"""Share of a device's or the CPU's free memory to plan with if the entry sets no limit."""

log = structlog.get_logger(__name__)


def load_split(model: Model, checkpoint: Checkpoint, device: str) -> FamilyPipeline:
    """Load the model onto the entry's devices; see `devices_of`.

    Raises ModelUnavailable, ConfigurationError, OutOfMemory.
    """
    check_quantization(model, checkpoint)
    modules = skeletons(model, checkpoint)
    devices = devices_of(model, device)
    use_device(torch.device(devices[0]))
    pipe = checkpoint.load(model, **modules)
    # With `unload`, a whole backlog's latents and embeddings wait between the phases, so they must
    # not take device memory.
    home = torch.device(CPU if model.unload else devices[0])
    family = make_family(_at_home(pipe, home), model.max_sequence_length)
    quantize = quantizers(model, checkpoint, devices[0])
    rooms = rooms_of(model, devices)
    layout = plan(parts(modules, checkpoint, model), rooms, first=DENOISE, in_turn=model.unload)
    keep = model.unload and CPU in model.max_memory and _fit_on_cpu(layout)
    residences = {
        name: Residence(
            modules[name],
            spread,
            partial(checkpoint.read, model, name, quantize=quantize.get(name)),
            checkpoint.source(name).weights,
            home=str(home),
            keep=keep,
            quantized=name in quantize or stored_method(checkpoint.source(name)) is not None,
        )
        for name, spread in layout.spreads.items()
    }
    loader = StageLoader(pipe, layout, residences)
    split = Split(family, loader, torch.device(devices[0]), phased=model.unload)
    _log_layout(split, model)
    if not model.unload:
        loader.load_all()
    _accelerate(split, model)
    if family.card.joins:
        _verify(split, model, home)
    return split


class Split(FamilyPipeline):
    """A family whose weights are on several devices, or on one in turn."""

    def __init__(
        self, family: Family, loader: StageLoader, device: torch.device, phased: bool
    ) -> None:
        super().__init__(cast(Family, _InTurn(family, loader, phased)), device=device)
        self.plain = family
        self.loader = loader
        self.phased = phased

    @property
    def device_map(self) -> dict[str, str | dict[str, str]]:
        """Where each component is, like diffusers' `hf_device_map`; by blocks if it's cut."""
        return self.loader.device_map

    def preview(self, sample: Sample) -> torch.Tensor | None:
        """The decoded guess; None while the decoder's weights aren't loaded."""
        if self.phased and not self.loader.is_loaded(DECODE):
            return None
        return super().preview(sample)


class _InTurn:
    """A family that loads a stage's weights before each method that needs them.

    Everything except `encode`, `step` and `decode` is forwarded to the family. If one of these runs
    out of memory while another stage's weights are loaded, those are unloaded and it's tried again.
    """

    def __init__(self, family: Family, loader: StageLoader, phased: bool) -> None:
        self._family, self._loader, self._phased = family, loader, phased

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def encode(self, text: str | None, role: Role) -> Conditioning:
        return self._run(ENCODE, lambda: self._family.encode(text, role))

    def step(self, samples: list[Sample], bucket: int = 0) -> None:
        self._run(DENOISE, lambda: self._family.step(samples, bucket))

    def decode(self, sample: Sample) -> torch.Tensor:
        return self._run(DECODE, lambda: self._family.decode(sample))

    def _run(self, stage: str, method: Callable[[], T]) -> T:
        self._loader.enter(stage)
        try:
            return method()
        except (RuntimeError, MemoryError) as error:
            if not (self._phased and is_out_of_memory(error) and self._loader.clear_for(stage)):
                raise
        return method()  # outside the handler, because the error keeps the failed call's tensors


def devices_of(model: Model, device: str) -> list[str]:
    """The entry's devices, else those in its max_memory, else every accelerator, else `device`.

    Raises ConfigurationError for an invalid device or one that this machine doesn't have.
    """
    named = [key for key in model.max_memory if key not in (CPU, DISK) and not key.isdigit()]
    devices = list(model.devices) or named or _accelerators(device) or [device]
    for name in devices:
        try:
            kind = torch.device(name)
        except RuntimeError as error:
            raise ConfigurationError(f"devices: invalid device {name!r}") from error
        if kind.type != CPU and name not in _accelerators(name):
            raise ConfigurationError(f"devices: {name} not found on this machine")
    if CPU in devices and len(devices) > 1:
        raise ConfigurationError("devices: cpu can't be combined with other devices")
    return devices


def rooms_of(model: Model, devices: list[str]) -> dict[str, int]:
    """Bytes for each device, the CPU and the disk: from max_memory, else what's free now.

    A key of max_memory may also be an index into `devices`, as in accelerate. Raises
    ConfigurationError for an unknown key.
    """
    limits: dict[str, int] = {}
    for key, size in model.max_memory.items():
        name = devices[int(key)] if key.isdigit() and int(key) < len(devices) else key
        if name not in (*devices, CPU, DISK):
            raise ConfigurationError(
                f"max_memory: unknown device {key!r}; expected {', '.join(devices)}, cpu or disk"
            )
        limits[name] = bytes_of(size)
    rooms = {name: limits.get(name, -1) for name in (*devices, CPU, DISK)}
    return {name: room if room >= 0 else _free(name) for name, room in rooms.items()}


def _accelerators(device: str) -> list[str]:
    kind = torch.device(device).type
    if kind == CPU:
        return []
    count = torch.get_device_module(kind).device_count()
    return [f"{kind}:{index}" for index in range(count)]


def _free(name: str) -> int:
    if name == DISK:
        return 2**62  # blocks are read from the checkpoint, so they take no new space
    if name == CPU:
        return int(SPARE * available_memory())
    return int(SPARE * torch.get_device_module(name).mem_get_info(torch.device(name))[0])


def _at_home(pipe: Any, home: torch.device) -> Any:
    """The pipe, which now puts latents and embeddings on `home`, wherever its components are.

    diffusers would use the first component's device, which may be the VAE's, or none ("meta").
    """
    kind = type(pipe)
    pipe.__class__ = type(
        kind.__name__, (kind,), {"_execution_device": home, "__module__": kind.__module__}
    )
    return pipe


def _accelerate(split: Split, model: Model) -> None:
    """Choose the attention kernel and compile, as a replica does. Raises ConfigurationError."""
    loader, trial = split.loader, partial(run_once, split, model)
    skeleton = loader.skeleton_of(denoiser_of(split.family.pipe))

    def reloaded() -> None:
        loader.unload(DENOISE)
        trial()

    spread = next(iter(loader.plan.stages[DENOISE]), None)
    if spread is None:
        return
    before = loader.loads.copy()
    choose_attention(skeleton, model.attention_backend, torch.device(spread.main), reloaded)
    # A stage that was loaded for the trials has the last kernel tried, which may not be the choice.
    if loader.loads != before:
        loader.unload(DENOISE)
        if not model.unload:
            loader.load_all()
    if model.compile:
        if WHOLE not in spread.where:
            raise ConfigurationError("compile: the denoiser doesn't fit on one device")
        compile_blocks(denoiser_of(split.family.pipe), trial)


def _verify(split: Split, model: Model, home: torch.device) -> None:
    """Compare a denoiser that is cut over devices with one that computes on a single device.

    Raises ConfigurationError with the difference.
    """
    [spread] = split.loader.plan.stages[DENOISE]
    if WHOLE in spread.where:
        return
    loader, name, pipe = split.loader, spread.part.name, split.plain.pipe
    split.encode(trials(split, model))  # so that `record` finds the embeddings in the cache
    for stage in STAGES if model.unload else (DENOISE,):
        loader.unload(stage)
    skeleton = getattr(pipe, name)
    setattr(pipe, name, loader.streamed(name))
    try:
        alone = FamilyPipeline(split.plain, split.cache)
        references = record(alone, model, torch.device(spread.main), home)
    finally:
        setattr(pipe, name, skeleton)
    release_memory()  # the hooks and their module refer to each other, so only gc frees them
    loader.enter(DENOISE)
    compare(references, getattr(pipe, name))
    log.info("verified split", model=model.name, device_map=split.device_map[name])


def _fit_on_cpu(layout: MemoryPlan) -> bool:
    """Whether a copy of all weights fits on the CPU, so later loads needn't read the disk."""
    return sum(s.part.size for s in layout.spreads.values()) <= layout.rooms[CPU]


def _log_layout(split: Split, model: Model) -> None:
    log.info("split", model=model.name, device_map=split.device_map, unload=model.unload)
    for spread in split.loader.plan.spreads.values():
        if spread.streamed:
            log.warning(
                "weights are copied to the device in every forward pass",
                model=model.name,
                component=spread.part.name,
                size=in_words(spread.streamed),
            )
