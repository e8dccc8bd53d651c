"""Two pretend devices: `pretend:0` and `pretend:1` compute on the CPU and track allocations.

As on an accelerator, operations on tensors of different devices fail. Every allocation counts
against its device's limit; exceeding it raises torch's own out-of-memory error. So a test can check
where every weight was, the peak memory, and what wasn't freed.

Registering the backend changes the process permanently (`torch.accelerator` finds it), so tests
that use it run in their own process. It's based on torch's PrivateUse1 backend for Python, which is
experimental. Nothing here depends on models.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration as registration

KIND = "pretend"
DEVICES = (f"{KIND}:0", f"{KIND}:1")
aten = torch.ops.aten


class Ledger:
    """Bytes on each device: current, peak and limit; and the copies between devices."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.resident: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.limits: dict[str, int] = {}
        self.moves: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def limit(self, limits: dict[str, int]) -> Iterator[None]:
        """Limit the bytes inside the block; the peak is counted from its start."""
        self.peak, self.limits, self.moves = Counter(self.resident), dict(limits), Counter()
        try:
            yield
        finally:
            self.limits = {}

    def take(self, device: str, size: int) -> None:
        """Record an allocation, or raise torch's out-of-memory error."""
        with self.lock:
            total = self.resident[device] + size
            if total > self.limits.get(device, total):
                raise torch.OutOfMemoryError(
                    f"{device} is out of memory: {total} of {self.limits[device]} bytes"
                )
            self.resident[device] = total
            self.peak[device] = max(self.peak[device], total)

    def give(self, device: str, size: int) -> None:
        """Remove an allocation."""
        with self.lock:
            self.resident[device] -= size


LEDGER = Ledger()


class Allocation:
    """A storage on a device, counted for as long as a tensor uses it."""

    def __init__(self, device: str, size: int) -> None:
        LEDGER.take(device, size)
        self.device, self.size = device, size

    def __del__(self) -> None:
        if hasattr(self, "size"):
            LEDGER.give(self.device, self.size)


_allocations: WeakValueDictionary[int, Allocation] = WeakValueDictionary()
"""Keys are addresses of CPU storages, which every tensor with an allocation keeps alive."""


def _allocation(real: torch.Tensor, device: str) -> Allocation:
    storage = real.untyped_storage()
    with LEDGER.lock:
        allocation = _allocations.get(storage._cdata)
        if allocation is None:
            allocation = _allocations[storage._cdata] = Allocation(device, storage.nbytes())
    return allocation


class Pretend(torch.Tensor):
    """A tensor that claims to be on a pretend device; `held` is the real one on the CPU."""

    held: torch.Tensor
    allocation: Allocation

    @staticmethod
    def __new__(
        cls, real: torch.Tensor, device: torch.device | None = None, requires_grad: bool = False
    ) -> Any:
        if device is None:  # accelerate recreates a parameter with its class
            return torch.nn.Parameter(real, requires_grad)
        with torch.inference_mode(real.is_inference()):  # a view must have its base's settings
            tensor: Pretend = torch.Tensor._make_wrapper_subclass(
                cls,
                real.shape,
                strides=real.stride(),
                storage_offset=real.storage_offset(),
                dtype=real.dtype,
                device=device,
            )
        tensor.held = real
        tensor.allocation = _allocation(real, str(device))
        return tensor

    def __repr__(self) -> str:
        return f"Pretend({self.held!r}, device={self.device})"

    def data_ptr(self) -> int:
        """The address on the CPU; otherwise all tensors would look tied to each other."""
        return self.held.data_ptr()

    def tolist(self) -> Any:
        """The numbers; torch doesn't support this for subclasses."""
        return self.held.tolist()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """Run attention fused, as on a device with a kernel for it: no [tokens, tokens] tensor."""
        if function is torch.nn.functional.scaled_dot_product_attention:
            return _run(function, args, kwargs or {})
        # Tensors copied off the device are plain ones.
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense":
            return function(args[0].held)
        if name == "copy_":
            return _copy(*args)
        if name == "_copy_from":
            return _copy_from(*args)
        if name == "_to_copy":
            return _moved(args[0], kwargs)
        if name == "to":  # not decomposed in inference mode
            return _to(args[0], (*args[1:], *kwargs.values()))
        return _run(function, args, kwargs)


def _real(value: Any) -> Any:
    return value.held if isinstance(value, Pretend) else value


def _placed(value: Any, device: torch.device) -> Any:
    return Pretend(value, device) if isinstance(value, torch.Tensor) else value


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU; the outputs are on the common device of all inputs."""
    flat = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    device = _common_device(function, flat)
    if kwargs.get("device") is not None:
        device = _exact(kwargs["device"])
        kwargs["device"] = "cpu" if device.type == KIND else device
    args, kwargs = pytree.tree_map(_real, (args, kwargs))
    result = function(*args, **kwargs)
    if device.type != KIND:
        return result
    known = {id(x.held): x for x in flat if isinstance(x, Pretend)}
    return pytree.tree_map(
        lambda x: known.get(id(x)) if id(x) in known else _placed(x, device), result
    )


def _common_device(function: Any, tensors: list[torch.Tensor]) -> torch.device:
    """The device of all tensors. As in torch, scalars and indices may be on the CPU."""
    devices = {x.device for x in tensors if isinstance(x, Pretend)}
    takes_indices = "index" in str(function)
    strangers = [x for x in tensors if not isinstance(x, Pretend) and x.ndim > 0]
    if len(devices) > 1 or (devices and strangers and not takes_indices):
        names = sorted({str(x.device) for x in tensors if x.ndim > 0 or isinstance(x, Pretend)})
        raise RuntimeError(
            f"{function}: expected all tensors to be on the same device, found {', '.join(names)}"
        )
    return devices.pop()


def _copy(target: torch.Tensor, source: torch.Tensor, *_: Any) -> torch.Tensor:
    if target.device != source.device:
        LEDGER.moves[str(source.device), str(target.device)] += source.numel()
    _real(target).copy_(_real(source))
    return target


def _copy_from(source: torch.Tensor, target: torch.Tensor, *_: Any) -> torch.Tensor:
    return _copy(target, source)


def _to(source: torch.Tensor, wishes: tuple[Any, ...]) -> torch.Tensor:
    """`source.to` in all its forms: with a device, a dtype, or another tensor."""
    like = next((wish for wish in wishes if isinstance(wish, torch.Tensor)), source)
    dtype = next((wish for wish in wishes if isinstance(wish, torch.dtype)), like.dtype)
    device = next((wish for wish in wishes if isinstance(wish, torch.device)), like.device)
    if (_exact(device), dtype) == (source.device, source.dtype):
        return source
    return _moved(source, {"device": device, "dtype": dtype})


def _moved(source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    device = _exact(kwargs.pop("device", None) or source.device)
    options = {name: kwargs[name] for name in ("dtype", "memory_format") if name in kwargs}
    if device.type == "meta":
        return aten._to_copy(_real(source), device=device, **options)
    if device != source.device:
        LEDGER.moves[str(source.device), str(device)] += source.numel()
    copy = aten._to_copy(_real(source), **options)
    return Pretend(copy, device) if device.type == KIND else copy


def _exact(device: Any) -> torch.device:
    device = torch.device(device)
    return torch.device(KIND, device.index or 0) if device.type == KIND else device


class _Backend:
    """The device module that torch and the libraries expect."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return len(DEVICES)

    def current_device(self) -> int:
        return 0

    def synchronize(self, *_: Any) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        name = str(_exact(device if isinstance(device, str | torch.device) else KIND))
        limit = LEDGER.limits.get(name, 2**33)
        return limit - LEDGER.resident[name], limit


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    memory_format = memory_format or torch.contiguous_format
    return Pretend(torch.empty(size, dtype=dtype, memory_format=memory_format), _exact(device))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return Pretend(torch.empty_strided(size, stride, dtype=dtype), _exact(device))


def register() -> None:
    """Register the devices with torch, permanently for this process."""
    registration._setup_privateuseone_for_python_backend(KIND, backend_module=_Backend())
    _library.impl("empty.memory_format", _empty, "PrivateUse1")
    _library.impl("empty_strided", _empty_strided, "PrivateUse1")
    _library.impl("_copy_from", _copy_from, "PrivateUse1")  # of `torch.tensor(..., device=...)`


_library = torch.library.Library("aten", "IMPL")
