"""A transformer cut into stages: which blocks each rank has, and only their weights loaded.

A stage is the model's own class with most of its blocks taken out of its lists; its forward is
diffusers' own and runs over the blocks that are left. `Stage.enter` and `Stage.leave` are where a
forward takes up what the stage before computed, and where it ends for the stage after. Knows no
process and no device but its own.
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

State = tuple[torch.Tensor, ...]
"""What one block hands to the next."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The blocks of a model class that run one after the other, each on what the last one made.

    `lists` maps a list of blocks, in the order of the forward, to the arguments that carry the
    state; all other arguments are made outside the blocks, alike on every rank. `first` names lists
    that run beside each other and not in the chain: they stay with the first stage.
    """

    lists: Mapping[str, tuple[str, ...]]
    first: tuple[str, ...] = ()


_BOTH = ("hidden_states", "encoder_hidden_states")
_ALONE = ("hidden_states",)

CHAINS: Mapping[str, Chain] = {
    "FluxTransformer2DModel": Chain(
        {"transformer_blocks": _BOTH, "single_transformer_blocks": _BOTH}
    ),
    "Flux2Transformer2DModel": Chain(
        {"transformer_blocks": _BOTH, "single_transformer_blocks": _ALONE}
    ),
    "PixArtTransformer2DModel": Chain({"transformer_blocks": _ALONE}),
    "QwenImageTransformer2DModel": Chain({"transformer_blocks": _BOTH}),
    "SD3Transformer2DModel": Chain({"transformer_blocks": _BOTH}),
    "SanaTransformer2DModel": Chain({"transformer_blocks": _ALONE}),
    "ZImageTransformer2DModel": Chain(
        {"layers": ("x",)}, first=("noise_refiner", "context_refiner")
    ),
}
"""Models whose forward asks nothing of a block but its output: not its index, not how many there
are. Where it does (Chroma's modulation, skip connections), blocks cannot be taken out."""


def split_points(sizes: Sequence[int], stages: int, first: int = 0) -> list[range]:
    """The blocks of each stage: consecutive, none without, the largest stage as small as can be.

    `sizes` are the blocks' bytes and `first` those that the first stage holds besides. Among equal
    splits the one whose later stages are larger is taken, since the first rank also encodes and
    decodes. Raises ConfigurationError when there are more stages than blocks.
    """
    if not 1 <= stages <= len(sizes):
        raise ConfigurationError(f"stages = {stages}, but there are {len(sizes)} blocks to share")

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
    """A block of a chain: its list, its place there, its bytes."""

    list_name: str
    index: int
    size: int

    @property
    def name(self) -> str:
        """The prefix of its weights' names."""
        return f"{self.list_name}.{self.index}"


def chain_of(module: Any) -> tuple[Chain, list[Block]]:
    """The chain of a model and its blocks in order. Raises ConfigurationError if none is known."""
    chain = CHAINS[_known(type(module).__name__)]
    blocks = [
        Block(name, index, _bytes(block))
        for name in chain.lists
        for index, block in enumerate(getattr(module, name))
    ]
    return chain, blocks


class _Left(Exception):
    """No error: the way out of a forward whose rest is another's."""


class _Exit(nn.Module):
    """Stands where the next stage's first block would: hands on its state, ends the forward."""

    def __init__(self, stage: "Stage", names: Sequence[str]) -> None:
        super().__init__()
        self.stage, self.names = stage, names

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.stage.leave(_state(self.names, args, kwargs))
        raise _Left


class Stage:
    """One rank's part of a transformer.

    `enter` takes the state that the forward brought to the first own block, whose shapes and
    dtypes are right and whose values are not, and returns the one to go on with. `leave` takes the
    state for the next stage. The first stage never enters, the last one never leaves.

    Building one takes the other stages' blocks out of `module`.
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
        """The model's forward as far as this stage goes: its output at the last one, else None."""
        try:
            return self.module(*args, **kwargs)
        except _Left:
            return None

    def _cut(self, chain: Chain, blocks: Sequence[Block], own: range) -> None:
        lists = {name: list(getattr(self.module, name)) for name in chain.lists}
        for name in lists:
            kept = [lists[name][blocks[i].index] for i in own if blocks[i].list_name == name]
            setattr(self.module, name, nn.ModuleList(kept))
        if not self.is_first:
            for name in chain.first:
                setattr(self.module, name, nn.ModuleList())
            entry = blocks[own.start]
            names = chain.lists[entry.list_name]
            block = lists[entry.list_name][entry.index]
            block.register_forward_pre_hook(self._entering(names), with_kwargs=True)
        if not self.is_last:
            following = blocks[own.stop].list_name
            getattr(self.module, following).append(_Exit(self, chain.lists[following]))

    def _entering(self, names: Sequence[str]) -> Callable[..., Any]:
        def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            state = self.enter(_state(names, args, kwargs))
            given = dict(zip(names, state, strict=True))
            if names[0] not in kwargs:
                args = (given.pop(names[0]), *args[1:])
            return args, kwargs | given

        return replace


@dataclass(frozen=True, slots=True)
class Plan:
    """A transformer without weights, the stages it is to be cut into, and where its weights are."""

    module: Any
    stages: Sequence[range]
    folder: Path
    files: Sequence[Path]
    dtype: torch.dtype


def plan_stages(model: Model, checkpoint: Checkpoint) -> Plan:
    """Decide who has which blocks, from the model's config and without reading a weight.

    Raises ConfigurationError for a model that cannot be cut or has too few blocks.
    """
    name = checkpoint.components.get("transformer")
    if name is None:
        raise ConfigurationError(f"pipelined: {checkpoint.class_name} has no transformer")
    folder = checkpoint.source("transformer").weights
    dtype = getattr(torch, model.dtype)
    module = _empty(_known(name), folder, dtype)
    chain, blocks = chain_of(module)
    first = sum(_bytes(getattr(module, name)) for name in chain.first)
    stages = split_points([block.size for block in blocks], model.stages, first)
    return Plan(module, stages, folder, _files(model, folder), dtype)


def load_stage(plan: Plan, rank: int, device: torch.device) -> Stage:
    """The stage of that rank; other stages' weights are not read. Uses the plan's module up.

    Raises ModelUnavailable for weights that are missing.
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
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which is of no use"
        raise ModelUnavailable(f"{plan.folder} {what} to {type(module).__name__}")
    module.to(device)
    return stage


def load_streamed(plan: Plan, device: torch.device) -> Any:
    """The whole transformer, computing on `device`, each layer's weights read when it is called.

    Slow, and small: there is no more on the device than one layer's. Uses the plan's module up.
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


def _known(name: str) -> str:
    if name not in CHAINS:
        raise ConfigurationError(
            f"pipelined: {name} is no model whose blocks can be shared out; "
            f"those are {', '.join(CHAINS)}"
        )
    return name


def _empty(name: str, folder: Path, dtype: torch.dtype) -> Any:
    """The transformer without weights, its constants made in `dtype` as `from_pretrained` does."""
    made = getattr(importlib.import_module("diffusers"), name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights():
            return made.from_config(made.load_config(folder))
    finally:
        torch.set_default_dtype(before)


def _read(
    plan: Plan, foreign: set[str], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of no foreign block, in the model's dtype."""
    for path in plan.files:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118 - no dict
                if not _prefixes(name) & foreign:
                    tensor = file.get_tensor(name)
                    yield name, tensor.to(plan.dtype) if tensor.is_floating_point() else tensor


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _files(model: Model, folder: Path) -> list[Path]:
    """The safetensors files of the model's variant, and no other's."""
    infix = f".{model.variant}" if model.variant else ""
    stem = f"diffusion_pytorch_model{infix}"
    found = sorted([*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*.safetensors")])
    if not found:
        raise ModelUnavailable(
            f"model {model.name!r}: {folder} has no {stem}*.safetensors; a pipelined model is read "
            f"from nothing else"
        )
    return found


def _prefixes(name: str) -> set[str]:
    """The list, and the block, that a weight's name begins with."""
    parts = name.split(".")
    return {parts[0], ".".join(parts[:2])}


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for _, tensor in _tensors(module))


def _state(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> State:
    """A block's arguments of these names; the first may have come without its name."""
    return tuple(
        kwargs[name] if name in kwargs else args[place] for place, name in enumerate(names)
    )


def _unconnected(state: State) -> Any:
    raise RuntimeError("a stage that is not connected to its neighbours")
