"""Split: one copy of a model over several devices, or its stages in turn on one that is too small.

The plan (`pipelines.planner.memory`) says where each component is. With `unload` the stages take
turns: text encoders, denoiser and VAE are loaded when their verb is first called, the next one in
the background if both fit, and unloaded when another needs the room. A backlog that is served phase
by phase pays for each load once. Knows no model's mathematics.
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
from pipelines.families import FAMILIES, make_family
from pipelines.families.family import Family, Role
from pipelines.loading.checkpoint import Checkpoint
from pipelines.loading.quantization import check_quantization, quantizers, stored_method
from pipelines.out_of_memory import is_out_of_memory
from pipelines.placements.family_pipeline import FamilyPipeline
from pipelines.placements.residence import Residence, give_back
from pipelines.placements.stage_loader import Turns
from pipelines.placements.verify import compare, record, trials
from pipelines.planner.host_memory import free_memory
from pipelines.planner.memory import CPU, DISK, WHOLE, Plan, bytes_of, in_words, plan
from pipelines.planner.skeleton import DECODE, DENOISE, ENCODE, STAGES, parts, skeletons
from pipelines.seam import Conditioning, Sample

T = TypeVar("T")

SPARE = 0.95
"""Of what a device or the CPU has free, how much is planned with where the entry sets no limit."""

log = structlog.get_logger(__name__)


def load_split(model: Model, checkpoint: Checkpoint, device: str) -> FamilyPipeline:
    """The model on all of the entry's devices; see `devices_of`.

    Raises ModelUnavailable, ConfigurationError, OutOfMemory.
    """
    check_split(model, checkpoint)
    modules = skeletons(model, checkpoint)
    devices = devices_of(model, device)
    use_device(torch.device(devices[0]))
    pipe = checkpoint.load(model, **modules)
    # The state of a whole backlog takes no device memory; without turns it stays on the device.
    home = torch.device(CPU if model.unload else devices[0])
    family = make_family(_at_home(pipe, home), model.max_sequence_length)
    wanted = quantizers(model, checkpoint, devices[0])
    rooms = rooms_of(model, devices)
    made = plan(parts(modules, checkpoint, model), rooms, first=DENOISE, in_turn=model.unload)
    keep = model.unload and CPU in model.max_memory and _fit_on_cpu(made)
    residences = {
        name: Residence(
            modules[name],
            spread,
            partial(checkpoint.read, model, name, quantize=wanted.get(name)),
            checkpoint.source(name).weights,
            home=str(home),
            keep=keep,
            quantized=name in wanted or stored_method(checkpoint.source(name)) is not None,
        )
        for name, spread in made.spreads.items()
    }
    turns = Turns(pipe, made, residences)
    split = Split(family, turns, torch.device(devices[0]), phased=model.unload)
    _tell(split, model)
    if not model.unload:
        turns.load_all()
    _accelerate(split, model)
    if family.card.joins:
        _verify(split, model, home)
    return split


class Split(FamilyPipeline):
    """A family whose weights are on several devices, or there in turn."""

    def __init__(self, family: Family, turns: Turns, device: torch.device, phased: bool) -> None:
        super().__init__(cast(Family, _InTurn(family, turns, phased)), device=device)
        self.plain = family
        self.turns = turns
        self.phased = phased

    @property
    def device_map(self) -> dict[str, str | dict[str, str]]:
        """Where each component is, as diffusers' `hf_device_map`; by blocks where it is cut."""
        return self.turns.device_map

    def preview(self, sample: Sample) -> torch.Tensor | None:
        """The decoded guess; None while the decoder's weights are not there."""
        if self.phased and not self.turns.is_loaded(DECODE):
            return None
        return super().preview(sample)


class _InTurn:
    """A family that has its stage's weights loaded before it needs them.

    Everything but the three verbs that compute is the family's own. A verb that runs out of memory
    beside another stage's weights is tried again without them.
    """

    def __init__(self, family: Family, turns: Turns, phased: bool) -> None:
        self._family, self._turns, self._phased = family, turns, phased

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def encode(self, text: str | None, role: Role) -> Conditioning:
        return self._run(ENCODE, lambda: self._family.encode(text, role))

    def step(self, samples: list[Sample], bucket: int = 0) -> None:
        self._run(DENOISE, lambda: self._family.step(samples, bucket))

    def decode(self, sample: Sample) -> torch.Tensor:
        return self._run(DECODE, lambda: self._family.decode(sample))

    def _run(self, stage: str, verb: Callable[[], T]) -> T:
        self._turns.enter(stage)
        try:
            return verb()
        except (RuntimeError, MemoryError) as error:
            if not (self._phased and is_out_of_memory(error) and self._turns.clear_for(stage)):
                raise
        return verb()  # past the handler, whose error held the failed call's tensors


def devices_of(model: Model, device: str) -> list[str]:
    """The entry's devices, else those that its max_memory names, else every accelerator.

    `device` where there is none of these. Raises ConfigurationError for a device that is not here.
    """
    named = [key for key in model.max_memory if key not in (CPU, DISK) and not key.isdigit()]
    found = list(model.devices) or named or _accelerators(device) or [device]
    for name in found:
        try:
            kind = torch.device(name)
        except RuntimeError as error:
            raise ConfigurationError(f"devices: {name!r} is no device such as 'cuda:0'") from error
        if kind.type != CPU and name not in _accelerators(name):
            raise ConfigurationError(f"devices: there is no {name} on this machine")
    if CPU in found and len(found) > 1:
        raise ConfigurationError("devices: the CPU computes only where it is the only device")
    return found


def rooms_of(model: Model, devices: list[str]) -> dict[str, int]:
    """Bytes for each device, the CPU and the disk: max_memory's, else what is free now.

    A key of max_memory may also be a device's number among `devices`, as in accelerate.
    """
    limits: dict[str, int] = {}
    for key, size in model.max_memory.items():
        name = devices[int(key)] if key.isdigit() and int(key) < len(devices) else key
        if name not in (*devices, CPU, DISK):
            raise ConfigurationError(
                f"max_memory: {key!r} is none of the devices {', '.join(devices)}, cpu and disk"
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
        return 2**62  # blocks are read from the checkpoint, which is there already
    if name == CPU:
        return int(SPARE * free_memory())
    return int(SPARE * torch.get_device_module(name).mem_get_info(torch.device(name))[0])


def _at_home(pipe: Any, home: torch.device) -> Any:
    """The pipe, saying that latents and embeddings belong on `home`, wherever its components are.

    diffusers would read it off the first component, which may be on the VAE's device, or nowhere.
    """
    kind = type(pipe)
    pipe.__class__ = type(
        kind.__name__, (kind,), {"_execution_device": home, "__module__": kind.__module__}
    )
    return pipe


def check_split(model: Model, checkpoint: Checkpoint) -> None:
    """Refuse by name what an entry asks for and a split cannot have. Raises ConfigurationError."""
    check_quantization(model, checkpoint)
    if model.unload and checkpoint.class_name not in FAMILIES:
        raise ConfigurationError(
            f"unload: {checkpoint.class_name} is called whole, so that its stages cannot take turns"
        )
    if model.cache is not None:
        raise ConfigurationError(f"cache {model.cache!r} is not served under placement 'split'")
    if model.cuda_graphs:
        raise ConfigurationError("cuda_graphs is not served under placement 'split'")
    if model.compile and model.unload:
        raise ConfigurationError("compile: with unload, every load would compile anew")


def _accelerate(split: Split, model: Model) -> None:
    """Choose the attention kernel, and compile, as a replica does. Raises ConfigurationError."""
    turns, trial = split.turns, partial(run_once, split, model)
    skeleton = turns.skeleton_of(denoiser_of(split.family.pipe))

    def reloaded() -> None:
        turns.unload(DENOISE)
        trial()

    spread = next(iter(turns.plan.stages[DENOISE]), None)
    if spread is None:
        return
    before = turns.loads.copy()
    choose_attention(skeleton, model.attention_backend, torch.device(spread.main), reloaded)
    if turns.loads != before:  # the kernel that was tried last may not be the one chosen
        turns.unload(DENOISE)
        if not model.unload:
            turns.load_all()
    if model.compile:
        if WHOLE not in spread.where:
            raise ConfigurationError("compile: the denoiser does not fit one device whole")
        compile_blocks(denoiser_of(split.family.pipe), trial)


def _verify(split: Split, model: Model, home: torch.device) -> None:
    """Compare a denoiser that is not whole on its device with one that computes on one device.

    Raises ConfigurationError saying what differs.
    """
    [spread] = split.turns.plan.stages[DENOISE]
    if WHOLE in spread.where:
        return
    turns, name, pipe = split.turns, spread.part.name, split.plain.pipe
    split.encode(trials(split, model))  # so that `record` finds the embeddings in the cache
    for stage in STAGES if model.unload else (DENOISE,):
        turns.unload(stage)
    skeleton = getattr(pipe, name)
    setattr(pipe, name, turns.streamed(name))
    try:
        alone = FamilyPipeline(split.plain, split.cache)
        references = record(alone, model, torch.device(spread.main), home)
    finally:
        setattr(pipe, name, skeleton)
    give_back()  # the hooks hold their module, and it them
    turns.enter(DENOISE)
    compare(references, getattr(pipe, name))
    log.info("verified split", model=model.name, device_map=split.device_map[name])


def _fit_on_cpu(made: Plan) -> bool:
    """Whether a copy of all weights may stay on the CPU, so that no load reads the disk."""
    return sum(s.part.size for s in made.spreads.values()) <= made.rooms[CPU]


def _tell(split: Split, model: Model) -> None:
    log.info("split", model=model.name, device_map=split.device_map, unload=model.unload)
    for spread in split.turns.plan.spreads.values():
        if spread.streamed:
            log.warning(
                "weights come to the device in every forward pass",
                model=model.name,
                component=spread.part.name,
                size=in_words(spread.streamed),
            )
