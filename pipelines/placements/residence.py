"""One component's weights: loaded from the checkpoint to the devices that the plan assigns.

`Residence.load` builds the component anew on every call, from the checkpoint or from a copy kept
on the CPU. Dropping the returned module frees the memory. Hooks move inputs to the device of the
module that takes them, and load blocks that are kept elsewhere only while they run. Has no code for
stages and makes no decisions.
"""

import copy
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from safetensors import safe_open
from torch import nn

from jobs.errors import ConfigurationError
from pipelines.loading.headers import SAFETENSORS
from pipelines.planner.memory import CPU, DISK, WHOLE, Spread
from pipelines.planner.skeleton import inner_module

Tensors = dict[str, torch.Tensor]
Source = Callable[[], Tensors]
"""Returns the tensors of one block that waits on the CPU or on the disk."""


class Residence:
    """Where one component's weights are while it's loaded.

    `skeleton` has the component's class and dtypes. `read` loads the component from the checkpoint
    onto a device; `weights` is the folder or file that it reads. `quantized` means that the stored
    tensors differ from the module's own. Outputs go to the device `home`. With `keep`, the first
    load leaves a copy on the CPU, and later loads read nothing.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        spread: Spread,
        read: Callable[[str], nn.Module],
        weights: Path,
        *,
        home: str,
        keep: bool = False,
        quantized: bool = False,
    ) -> None:
        self.skeleton, self.spread, self.weights = skeleton, spread, weights
        self.home, self.keep, self.quantized = home, keep, quantized
        self._from_checkpoint = read
        self._kept: nn.Module | None = None

    @property
    def device_map(self) -> dict[str, str]:
        """Module name -> device, like diffusers' `hf_device_map`."""
        where = dict(self.spread.where)
        return where if WHOLE in where else {WHOLE: self.spread.main, **where}

    def load(self) -> nn.Module:
        """Load the component with its hooks. Raises torch's out-of-memory error."""
        # A verb may load its stage inside its own inference mode, where weights would become
        # inference tensors, which can't be changed in place outside of it.
        with torch.inference_mode(False), torch.no_grad():
            module = self._placed()
        _same_attention(module, self.skeleton)
        _add_hooks(module, self.spread, self._waiting(module), self.home)
        module.hf_device_map = self.device_map  # type: ignore[assignment]
        return module

    def streamed(self) -> nn.Module:
        """The component computing on one device, with each layer's weights loaded when it runs.

        Slow, but needs little memory. Doesn't share hooks with `load`, so `verify` can compare the
        two.
        """
        with torch.inference_mode(False), torch.no_grad():
            module = _copied(self._kept or self._read(CPU), lambda _: CPU)
            if self.quantized:  # accelerate's hooks rebuild each tensor and would lose its scales
                _load_each(module, self.spread.main)
            else:
                module = cpu_offload(module, torch.device(self.spread.main))
        _same_attention(module, self.skeleton)
        return module

    def _placed(self) -> nn.Module:
        where = self.spread.where
        # The fast way: straight from the file to the device. Anything else goes over the CPU.
        if not self.keep and WHOLE in where:
            return self._read(where[WHOLE])
        source = self._kept or self._read(CPU)
        if self.keep:
            self._kept = source
        return _copied(source, self._device_of)

    def _read(self, device: str) -> nn.Module:
        """The component as its library loads it, onto a single device."""
        return self._from_checkpoint(device)

    def _device_of(self, name: str) -> str:
        """The device where a tensor stays; "meta" for those that wait on the disk."""
        place = next(
            (p for block, p in self.spread.where.items() if _is_in(name, block)), self.spread.main
        )
        return "meta" if place == DISK else place

    def _waiting(self, module: nn.Module) -> dict[str, Source]:
        """For each block that's loaded only while it runs, the source of its tensors."""
        sources: dict[str, Source] = {}
        for block, place in self.spread.where.items():
            if place == CPU and self.spread.main != CPU:
                tensors = dict(_tensors(inner_module(module, block)))
                sources[block] = lambda tensors=tensors: tensors  # type: ignore[misc]
            elif place == DISK:
                sources[block] = self._on_disk(block)
        return sources

    def _on_disk(self, block: str) -> Source:
        """A reader of one block from the checkpoint's own files, so no offload folder is written.

        Raises ConfigurationError if the block can't be read on its own.
        """
        if self.quantized:
            raise ConfigurationError(
                f"{self.weights} is quantized, so single blocks can't be read from the disk: "
                "raise max_memory for cpu"
            )
        expected = dict(_tensors(inner_module(self.skeleton, block)))
        files = {}
        single = [self.weights] if self.weights.suffix == SAFETENSORS else None
        for path in single or sorted(self.weights.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
        missing = next((name for name in expected if f"{block}.{name}" not in files), None)
        if missing is not None:
            raise ConfigurationError(
                f"{block}.{missing} not found in {self.weights}, whose names differ from the "
                "model's, so single blocks can't be read from the disk: raise max_memory for cpu"
            )

        def read() -> Tensors:
            tensors = {}
            for name, like in expected.items():
                with safe_open(files[f"{block}.{name}"], framework="pt") as file:
                    tensors[name] = file.get_tensor(f"{block}.{name}").to(like.dtype)
            return tensors

        return read


_IN_PLACE = ["feat_cache", "feat_idx"]
"""Arguments that a video autoencoder changes in place. Changes to a moved copy would be lost."""


class _MoveInputs(ModelHook):  # type: ignore[misc]
    """Moves a module's inputs to its device, and its output on to `after`."""

    def __init__(self, device: str, after: str | None = None) -> None:
        self.execution_device, self.after = device, after

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device = self.execution_device
        return send_to_device(args, device), send_to_device(kwargs, device, skip_keys=_IN_PLACE)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output if self.after is None else send_to_device(output, self.after)


class _LoadBlock(_MoveInputs):
    """Loads a block's weights onto the device only while the block runs."""

    def __init__(self, block: nn.Module, source: Source, device: str, after: str) -> None:
        super().__init__(device, after)
        self.block, self.source = block, source
        self.unloaded = dict(_tensors(block))  # on the CPU, or "meta" if they wait on the disk

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, tensor in self.source().items():
            _assign(module, name, tensor.to(self.execution_device))
        return super().pre_forward(module, *args, **kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.unload()
        return super().post_forward(module, output)

    def unload(self) -> None:
        """Take the weights off the device."""
        for name, tensor in self.unloaded.items():
            _assign(self.block, name, tensor)


class _LoadOwnTensors(_MoveInputs):
    """Loads a module's own tensors, not its children's, onto the device while it runs."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.unloaded = dict(_own_tensors(module))
        for name, tensor in self.unloaded.items():
            _assign(module, name, tensor.to(self.execution_device))
        return super().pre_forward(module, *args, **kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for name, tensor in self.unloaded.items():
            _assign(module, name, tensor)
        return super().post_forward(module, output)


def _load_each(module: nn.Module, device: str) -> None:
    """Add hooks that load each module's own tensors while it runs, one module at a time."""
    for inner in module.modules():
        if inner is module or any(True for _ in _own_tensors(inner)):
            add_hook_to_module(inner, _LoadOwnTensors(device))


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


class _ComponentHook(_MoveInputs):
    """The hook around the whole component, which sends its outputs to `home`.

    Not to the device of the inputs: diffusers puts some inputs on the component's device and later
    joins the outputs of two components, which must then be on one device.
    """

    def __init__(self, device: str, home: str, block_hooks: Sequence[_LoadBlock]) -> None:
        super().__init__(device, home)
        self.block_hooks = block_hooks

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A forward pass that raised skipped its `post_forward` and left a block on the device.
        for hook in self.block_hooks:
            hook.unload()
        return super().pre_forward(module, *args, **kwargs)


def _add_hooks(module: nn.Module, spread: Spread, waiting: Mapping[str, Source], home: str) -> None:
    """Add the hooks to a component whose tensors are in place."""
    main: str = spread.main
    block_hooks: list[_LoadBlock] = []
    if hasattr(module, "decode"):
        # A VAE is called by `decode`, which runs no hooks of the module itself, so its children
        # move their inputs.
        for child in module.children():
            add_hook_to_module(child, _MoveInputs(main))
    elif WHOLE not in spread.where:
        names = list(spread.where)
        # After the last block of a list, diffusers' own forward continues on the main device.
        last = {name.rpartition(".")[0]: name for name in names}.values()
        for name in names:
            block = inner_module(module, name)
            device = main if name in waiting else spread.where[name]
            after = main if name in last else device
            if name in waiting:
                block_hooks.append(_LoadBlock(block, waiting[name], main, after))
                add_hook_to_module(block, block_hooks[-1])
            else:
                add_hook_to_module(block, _MoveInputs(device, after))
    add_hook_to_module(module, _ComponentHook(main, home, block_hooks))


def _same_attention(module: nn.Module, skeleton: nn.Module) -> None:
    """Copy the attention kernels chosen on the skeleton, so that every load has them."""
    for inner, like in zip(module.modules(), skeleton.modules(), strict=True):
        chosen = getattr(getattr(like, "processor", None), "_attention_backend", None)
        if chosen is not None:
            cast(Any, inner).processor._attention_backend = chosen


def _copied(source: nn.Module, device_of: Callable[[str], str]) -> nn.Module:
    """A copy with its tensors on other devices; tensors that needn't move are shared.

    The tensors go into deepcopy's memo, so it copies the modules but takes these tensors as done.
    Tied weights have one id, and stay tied.
    """
    memo: dict[int, Any] = {}
    for name, tensor in _tensors(source):
        if id(tensor) not in memo:
            moved = tensor.to(device_of(name))
            is_own = isinstance(moved, nn.Parameter) and type(moved) is not nn.Parameter
            if isinstance(tensor, nn.Parameter) and not is_own:  # GGUF parameters keep their class
                moved = nn.Parameter(moved, requires_grad=False)
            memo[id(tensor)] = moved
    return copy.deepcopy(source, memo)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights and buffers by name; tied ones under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _assign(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, last = name.rpartition(".")
    owner = inner_module(module, path)
    if last in owner._parameters:
        owner._parameters[last] = (
            tensor
            if isinstance(tensor, nn.Parameter)
            else nn.Parameter(tensor, requires_grad=False)
        )
    else:
        owner._buffers[last] = tensor


def _is_in(name: str, block: str) -> bool:
    return block == WHOLE or name.startswith(f"{block}.")


def clear_function_caches(module: nn.Module) -> None:
    """Empty the function caches of the module's classes.

    diffusers caches Qwen-Image's rotary frequencies in one, and its keys keep the module and its
    tensors alive forever.
    """
    for kind in {type(inner) for inner in module.modules()}:
        for attribute in vars(kind).values():
            for cell in getattr(attribute, "__closure__", None) or ():
                # diffusers wraps the cached function in a decorator, so it's only in the closure.
                if hasattr(cell.cell_contents, "cache_clear"):
                    cell.cell_contents.cache_clear()


def release_memory() -> None:
    """Free unreferenced tensors and return their memory from the allocator to the device."""
    gc.collect()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        torch.get_device_module(accelerator).empty_cache()
