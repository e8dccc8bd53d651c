"""A transformer cut into stages: which blocks each rank has, and loading only their weights.

A stage is the model's own class with the other stages' blocks removed from its lists, so its
forward is diffusers' own and runs over the remaining blocks. `Stage.enter` is where a forward pass
takes over the previous stage's state, `Stage.leave` where it hands its state to the next stage.
Has no code for processes or devices.
"""

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import attach_align_device_hook
from accelerate.utils import OffloadedWeightsLoader
from safetensors import safe_open
from torch import nn

from jobs.catalog import Model
from jobs.errors import ConfigurationError, ModelUnavailable
from pipelines.loading.checkpoint import Checkpoint
from pipelines.placements.transformer_classes import Chain, chain_of_class

State = tuple[torch.Tensor, ...]
"""The tensors that one block passes to the next."""


def split_points(sizes: Sequence[int], stages: int, first: int = 0) -> list[range]:
    """The blocks of each stage: consecutive, at least one, the largest stage as small as possible.

    `sizes` are the blocks' bytes; `first` are the bytes that the first stage holds in addition. Of
    equally good splits, picks the one with larger later stages, because the first rank also encodes
    and decodes. Raises ConfigurationError if there are more stages than blocks.
    """
    if not 1 <= stages <= len(sizes):
        raise ConfigurationError(f"stages = {stages}, but there are only {len(sizes)} blocks")

    @functools.cache
    def best(start: int, left: int) -> tuple[int, tuple[int, ...]]:
        """The largest stage's bytes and the ends of `left` stages over the blocks from `start`."""
        extra = first if start == 0 else 0
        if left == 1:
            return extra + sum(sizes[start:]), (len(sizes),)
        splits = []
        for end in range(start + 1, len(sizes) - left + 2):
            largest, ends = best(end, left - 1)
            splits.append((max(extra + sum(sizes[start:end]), largest), (end, *ends)))
        return min(splits)

    _, ends = best(0, stages)
    return [range(start, end) for start, end in itertools.pairwise((0, *ends))]


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a chain: its list, its index there, its size in bytes."""

    list_name: str
    index: int
    size: int

    @property
    def name(self) -> str:
        """The prefix of its weights' names."""
        return f"{self.list_name}.{self.index}"


def chain_of(module: Any) -> tuple[Chain, list[Block]]:
    """A model's chain and its blocks in order. Raises ConfigurationError for unknown classes."""
    chain = chain_of_class(type(module).__name__)
    blocks = [
        Block(name, index, _bytes(block))
        for name in chain.lists
        for index, block in enumerate(getattr(module, name))
    ]
    return chain, blocks


class _StageEnd(Exception):
    """Not an error: ends a forward pass whose remaining blocks belong to the next stage."""


class _Exit(nn.Module):
    """Takes the place of the next stage's first block: sends the state on, ends the forward pass.

    What follows the blocks in diffusers' forward must not run here, hence the exception.
    """

    def __init__(self, stage: "Stage", names: Sequence[str]) -> None:
        super().__init__()
        self.stage, self.names = stage, names

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.stage.leave(_state(self.names, args, kwargs))
        raise _StageEnd


class Stage:
    """One rank's part of a transformer.

    `enter` gets the state with which the forward pass arrives at the stage's first block. Its
    shapes and dtypes are right, but its values aren't, because earlier blocks are missing; `enter`
    returns the real state. `leave` gets the state for the next stage. The first stage never calls
    `enter`, the last one never calls `leave`.

    The constructor removes the other stages' blocks from `module`.
    """

    def __init__(self, module: Any, own: range) -> None:
        chain, blocks = chain_of(module)
        self.module = module
        self.own = [blocks[index].name for index in own]
        self.is_first = own.start == 0
        self.is_last = own.stop == len(blocks)
        self.enter: Callable[[State], State] = _unconnected
        self.leave: Callable[[State], None] = _unconnected
        self._cut(chain, blocks, own)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run this stage's part of the forward pass; returns the last stage's output, else None."""
        try:
            return self.module(*args, **kwargs)
        except _StageEnd:
            return None

    def _cut(self, chain: Chain, blocks: Sequence[Block], own: range) -> None:
        lists = {name: list(getattr(self.module, name)) for name in chain.lists}
        for name in lists:
            own_blocks = [lists[name][blocks[i].index] for i in own if blocks[i].list_name == name]
            setattr(self.module, name, nn.ModuleList(own_blocks))
        if not self.is_first:
            for name in chain.first:
                setattr(self.module, name, nn.ModuleList())
            entry = blocks[own.start]
            names = chain.lists[entry.list_name]
            block = lists[entry.list_name][entry.index]
            block.register_forward_pre_hook(self._entering(names), with_kwargs=True)
        if not self.is_last:
            next_list = blocks[own.stop].list_name
            getattr(self.module, next_list).append(_Exit(self, chain.lists[next_list]))

    def _entering(self, names: Sequence[str]) -> Callable[..., Any]:
        def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            state = self.enter(_state(names, args, kwargs))
            replaced = dict(zip(names, state, strict=True))
            if names[0] not in kwargs:
                args = (replaced.pop(names[0]), *args[1:])
            return args, kwargs | replaced

        return replace


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A transformer without weights, the blocks of its stages, and where its weights are."""

    module: Any
    stages: Sequence[range]
    folder: Path
    files: Sequence[Path]
    dtype: torch.dtype


def plan_stages(model: Model, checkpoint: Checkpoint) -> StagePlan:
    """Decide which rank gets which blocks, from the model's config, without reading weights.

    Raises ConfigurationError for a model that can't be cut or has too few blocks.
    """
    name = checkpoint.components.get("transformer")
    if name is None:
        raise ConfigurationError(f"pipelined: {checkpoint.class_name} has no transformer")
    folder = checkpoint.source("transformer").weights
    dtype = getattr(torch, model.dtype)
    chain_of_class(name)
    module = _empty(name, folder, dtype)
    chain, blocks = chain_of(module)
    first = sum(_bytes(getattr(module, name)) for name in chain.first)
    stages = split_points([block.size for block in blocks], model.stages, first)
    return StagePlan(module, stages, folder, _files(model, folder), dtype)


def load_stage(plan: StagePlan, rank: int, device: torch.device) -> Stage:
    """Load that rank's stage without reading other stages' weights. Consumes the plan's module.

    Raises ModelUnavailable if weights are missing or unexpected.
    """
    module, own = plan.module, plan.stages[rank]
    chain, blocks = chain_of(module)
    foreign = {block.name for block in blocks} - {blocks[i].name for i in own}
    foreign |= set(chain.first) if own.start else set()
    unknown = module.load_state_dict(
        dict(_read(plan, foreign, device)), strict=False, assign=True
    ).unexpected_keys
    stage = Stage(module.eval(), own)
    missing = [name for name, tensor in _tensors(module) if tensor.is_meta]
    if missing or unknown:
        problem = f"missing weight {missing[0]}" if missing else f"unexpected weight {unknown[0]}"
        raise ModelUnavailable(f"{plan.folder}: {problem} for {type(module).__name__}")
    module.to(device)
    return stage


def load_streamed(plan: StagePlan, device: torch.device) -> Any:
    """The whole transformer, computing on `device`; each layer's weights are read when it runs.

    Slow, but holds only one layer's weights on the device. Consumes the plan's module.
    """
    index = {
        name: {"safetensors_file": str(path), "weight_name": name, "dtype": _name(plan.dtype)}
        for path in plan.files
        for name in _names(path)
    }
    buffers = {name for name, _ in plan.module.named_buffers()} & set(index)
    weights = OffloadedWeightsLoader(index=index)
    plan.module.load_state_dict({name: weights[name] for name in buffers}, strict=False)
    attach_align_device_hook(
        plan.module.eval(), execution_device=device, offload=True, weights_map=weights
    )
    return plan.module


def _empty(name: str, folder: Path, dtype: torch.dtype) -> Any:
    """The transformer without weights, its constants in `dtype` as `from_pretrained` makes them."""
    kind = getattr(importlib.import_module("diffusers"), name)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights():
            return kind.from_config(kind.load_config(folder))
    finally:
        torch.set_default_dtype(default_dtype)


def _read(
    plan: StagePlan, foreign: set[str], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights except those of foreign blocks, in the model's dtype."""
    for path in plan.files:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if not _prefixes(name) & foreign:
                    tensor = file.get_tensor(name)
                    yield name, tensor.to(plan.dtype) if tensor.is_floating_point() else tensor


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _files(model: Model, folder: Path) -> list[Path]:
    """The safetensors files of the model's variant only."""
    infix = f".{model.variant}" if model.variant else ""
    stem = f"diffusion_pytorch_model{infix}"
    files = sorted([*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*.safetensors")])
    if not files:
        raise ModelUnavailable(
            f"model {model.name!r}: no {stem}*.safetensors in {folder}, which placement "
            "'pipelined' requires"
        )
    return files


def _prefixes(name: str) -> set[str]:
    """The names of the list and of the block that a weight belongs to."""
    parts = name.split(".")
    return {parts[0], ".".join(parts[:2])}


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for _, tensor in _tensors(module))


def _state(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> State:
    """A block's arguments of these names, whether passed by position or by name."""
    return tuple(
        kwargs[name] if name in kwargs else args[place] for place, name in enumerate(names)
    )


def _unconnected(state: State) -> Any:
    raise RuntimeError("the stage isn't connected to its neighbours")
