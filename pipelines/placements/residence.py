"""One component's weights: brought from the checkpoint to where the plan wants them, and let go.

`Residence.load` makes the component anew at every call: from the checkpoint, or from a copy that
is kept on the CPU. Whoever forgets what it made has given the memory back. Hooks carry tensors to
the device of the module that takes them, and carry waiting blocks there and off again. Knows no
stages and no order; decides nothing.
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


class Residence:
    """Where one component lives while it is loaded.

    `skeleton` has its class and dtypes. `read` loads it from the checkpoint to a device, and
    `weights` is the folder or file that it reads; `quantized` says that tensors there aren't the
    module's own. Outputs go to the device `home`. With `keep`, the first load leaves a copy on the
    CPU, and later ones read nothing.
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
        """Module name to device, as diffusers' `hf_device_map` tells it."""
        where = dict(self.spread.where)
        return where if WHOLE in where else {WHOLE: self.spread.main, **where}

    def load(self) -> nn.Module:
        """The component, its weights in place and its hooks on. Raises torch's out-of-memory."""
        with torch.inference_mode(False), torch.no_grad():
            module = self._placed()
        _same_attention(module, self.skeleton)
        _hook(module, self.spread, self._waiting(module), self.home)
        module.hf_device_map = self.device_map  # type: ignore[assignment]
        return module

    def streamed(self) -> nn.Module:
        """The component as it is on one device, where each layer's weights come when it is called.

        Slow, and small; and by other hooks than `load`'s, so that the two can be compared.
        """
        with torch.inference_mode(False), torch.no_grad():
            module = _copied(self._kept or self._read(CPU), lambda _: CPU)
            if self.quantized:  # accelerate's hooks make each tensor anew, and lose its scales
                _bring_each(module, self.spread.main)
            else:
                module = cpu_offload(module, torch.device(self.spread.main))
        _same_attention(module, self.skeleton)
        return module

    def _placed(self) -> nn.Module:
        where = self.spread.where
        if not self.keep and WHOLE in where:
            return self._read(where[WHOLE])
        source = self._kept or self._read(CPU)
        if self.keep:
            self._kept = source
        return _copied(source, self._device_of)

    def _read(self, device: str) -> nn.Module:
        """The component as its library loads it, straight to one device."""
        return self._from_checkpoint(device)

    def _device_of(self, name: str) -> str:
        """The device that a tensor rests on; blocks on the disk are nowhere."""
        place = next(
            (p for block, p in self.spread.where.items() if _is_in(name, block)), self.spread.main
        )
        return "meta" if place == DISK else place

    def _waiting(self, module: nn.Module) -> dict[str, Source]:
        """For each block that comes only when it runs: where its tensors are had from."""
        found: dict[str, Source] = {}
        for block, place in self.spread.where.items():
            if place == CPU and self.spread.main != CPU:
                tensors = dict(_tensors(inner_module(module, block)))
                found[block] = lambda tensors=tensors: tensors  # type: ignore[misc]
            elif place == DISK:
                found[block] = self._on_disk(block)
        return found

    def _on_disk(self, block: str) -> Source:
        """A reader of one block from the checkpoint's own file; nothing is written anywhere."""
        if self.quantized:
            raise ConfigurationError(
                f"{self.weights} is quantized, so that its blocks cannot be read by themselves and "
                "wait on the disk: give the CPU more max_memory"
            )
        wanted = dict(_tensors(inner_module(self.skeleton, block)))
        files = {}
        single = [self.weights] if self.weights.suffix == SAFETENSORS else None
        for path in single or sorted(self.weights.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
        missing = next((name for name in wanted if f"{block}.{name}" not in files), None)
        if missing is not None:
            raise ConfigurationError(
                f"{self.weights} names its weights otherwise than the model does, so that "
                f"{block}.{missing} cannot be read from it by itself: give the CPU more max_memory"
            )

        def read() -> Tensors:
            tensors = {}
            for name, like in wanted.items():
                with safe_open(files[f"{block}.{name}"], framework="pt") as file:
                    tensors[name] = file.get_tensor(f"{block}.{name}").to(like.dtype)
            return tensors

        return read


_IN_PLACE = ["feat_cache", "feat_idx"]
"""Arguments that a video autoencoder changes in place, and that a carried copy would lose."""


class _Bring(ModelHook):  # type: ignore[misc]
    """Carries a module's inputs to its device, and its output on to `after`."""

    def __init__(self, device: str, after: str | None = None) -> None:
        self.execution_device, self.after = device, after

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device = self.execution_device
        return send_to_device(args, device), send_to_device(kwargs, device, skip_keys=_IN_PLACE)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output if self.after is None else send_to_device(output, self.after)


class _Wait(_Bring):
    """Carries a block's weights to the device for the time in which it runs."""

    def __init__(self, block: nn.Module, source: Source, device: str, after: str) -> None:
        super().__init__(device, after)
        self.block, self.source = block, source
        self.away = dict(_tensors(block))

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, tensor in self.source().items():
            _assign(module, name, tensor.to(self.execution_device))
        return super().pre_forward(module, *args, **kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.leave()
        return super().post_forward(module, output)

    def leave(self) -> None:
        """Take the weights off the device."""
        for name, tensor in self.away.items():
            _assign(self.block, name, tensor)


class _BringOwn(_Bring):
    """Carries a module's own tensors, without its children's, to the device while it runs."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.away = dict(_own_tensors(module))
        for name, tensor in self.away.items():
            _assign(module, name, tensor.to(self.execution_device))
        return super().pre_forward(module, *args, **kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for name, tensor in self.away.items():
            _assign(module, name, tensor)
        return super().post_forward(module, output)


def _bring_each(module: nn.Module, device: str) -> None:
    """Have each module's own tensors come to the device while it runs, one module at a time."""
    for inner in module.modules():
        if inner is module or any(True for _ in _own_tensors(inner)):
            add_hook_to_module(inner, _BringOwn(device))


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


class _Door(_Bring):
    """Around the whole component. Outputs always go home: not to where the inputs came from, since
    diffusers puts some inputs on the component's device and then joins outputs of two components.

    A forward that ended in an error has left the weights of the block it was in on the device;
    the next one begins without them.
    """

    def __init__(self, device: str, home: str, waits: Sequence[_Wait]) -> None:
        super().__init__(device, home)
        self.waits = waits

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for wait in self.waits:
            wait.leave()
        return super().pre_forward(module, *args, **kwargs)


def _hook(module: nn.Module, spread: Spread, waiting: Mapping[str, Source], home: str) -> None:
    """Put the hooks on a component whose tensors are in place.

    The last of a list of blocks gives its output to the main device, where the model's own forward
    goes on. A VAE is entered by `decode`, so that its children carry instead of the whole.
    """
    main: str = spread.main
    waits: list[_Wait] = []
    if hasattr(module, "decode"):
        for child in module.children():
            add_hook_to_module(child, _Bring(main))
    elif WHOLE not in spread.where:
        names = list(spread.where)
        last = {name.rpartition(".")[0]: name for name in names}.values()
        for name in names:
            block = inner_module(module, name)
            device = main if name in waiting else spread.where[name]
            after = main if name in last else device
            if name in waiting:
                waits.append(_Wait(block, waiting[name], main, after))
            add_hook_to_module(block, waits[-1] if name in waiting else _Bring(device, after))
    add_hook_to_module(module, _Door(main, home, waits))


def _same_attention(module: nn.Module, skeleton: nn.Module) -> None:
    """The attention kernels that were chosen on the skeleton, so that every load has them."""
    for made, like in zip(module.modules(), skeleton.modules(), strict=True):
        chosen = getattr(getattr(like, "processor", None), "_attention_backend", None)
        if chosen is not None:
            cast(Any, made).processor._attention_backend = chosen


def _copied(source: nn.Module, device_of: Callable[[str], str]) -> nn.Module:
    """A copy whose tensors are elsewhere; a tensor that stays where it is, is shared."""
    memo: dict[int, Any] = {}
    for name, tensor in _tensors(source):
        if id(tensor) not in memo:
            moved = tensor.to(device_of(name))
            is_own = isinstance(moved, nn.Parameter) and type(moved) is not nn.Parameter
            if isinstance(tensor, nn.Parameter) and not is_own:  # GGUF's keep their own class
                moved = nn.Parameter(moved, requires_grad=False)
            memo[id(tensor)] = moved
    return copy.deepcopy(source, memo)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights and buffers by their names, tied ones under each."""
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


def forget_caches(module: nn.Module) -> None:
    """Empty the caches of functions that the module's classes have.

    diffusers keeps Qwen-Image's rotary frequencies in one, which holds module and tensors for good.
    """
    for kind in {type(inner) for inner in module.modules()}:
        for attribute in vars(kind).values():
            for cell in getattr(attribute, "__closure__", None) or ():
                if hasattr(cell.cell_contents, "cache_clear"):
                    cell.cell_contents.cache_clear()


def give_back() -> None:
    """Collect what nobody holds, and let the accelerator's allocator return it."""
    gc.collect()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        torch.get_device_module(accelerator).empty_cache()
