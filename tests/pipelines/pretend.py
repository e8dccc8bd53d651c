"""Two devices that are none: `pretend:0` and `pretend:1` compute on the CPU and keep books.

A tensor on one of them refuses to meet a tensor on another device or on the CPU, as an
accelerator's would, and every allocation is counted against its device's limit: past it comes
torch's own out-of-memory error. So a test can say where every weight was, how much was resident
at most, and what was left behind.

Registering the backend changes the process for good (`torch.accelerator` finds it), so tests that
use it run in a process of their own. It stands on torch's PrivateUse1 backend for Python, which is
experimental. Knows nothing of models.
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
    """Bytes resident on each device now, at most so far, and allowed; and what was moved."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.resident: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.limits: dict[str, int] = {}
        self.moves: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def limit(self, limits: dict[str, int]) -> Iterator[None]:
        """Allow no more than these bytes inside the block; the peak counts from its start."""
        self.peak, self.limits, self.moves = Counter(self.resident), dict(limits), Counter()
        try:
            yield
        finally:
            self.limits = {}

    def take(self, device: str, size: int) -> None:
        """Book an allocation, or raise torch's out-of-memory error."""
        with self.lock:
            wanted = self.resident[device] + size
            if wanted > self.limits.get(device, wanted):
                raise torch.OutOfMemoryError(
                    f"{device} is out of memory: {wanted} of {self.limits[device]} bytes"
                )
            self.resident[device] = wanted
            self.peak[device] = max(self.peak[device], wanted)

    def give(self, device: str, size: int) -> None:
        """Take an allocation off the books."""
        with self.lock:
            self.resident[device] -= size


LEDGER = Ledger()


class Allocation:
    """A storage on a device, on the books for as long as a tensor holds it."""

    def __init__(self, device: str, size: int) -> None:
        LEDGER.take(device, size)
        self.device, self.size = device, size

    def __del__(self) -> None:
        if hasattr(self, "size"):
            LEDGER.give(self.device, self.size)


_allocations: WeakValueDictionary[int, Allocation] = WeakValueDictionary()
"""By the address of the storage on the CPU, which every tensor with an allocation keeps alive."""


def _allocation(real: torch.Tensor, device: str) -> Allocation:
    storage = real.untyped_storage()
    with LEDGER.lock:
        found = _allocations.get(storage._cdata)
        if found is None:
            found = _allocations[storage._cdata] = Allocation(device, storage.nbytes())
    return found


class Pretend(torch.Tensor):
    """A tensor that says it is on a pretend device; `held` is it on the CPU."""

    held: torch.Tensor
    allocation: Allocation

    @staticmethod
    def __new__(
        cls, real: torch.Tensor, device: torch.device | None = None, requires_grad: bool = False
    ) -> Any:
        if device is None:  # accelerate makes a parameter anew by the class that it has
            return torch.nn.Parameter(real, requires_grad)
        with torch.inference_mode(real.is_inference()):  # a view must be as its base is
            made: Pretend = torch.Tensor._make_wrapper_subclass(
                cls,
                real.shape,
                strides=real.stride(),
                storage_offset=real.storage_offset(),
                dtype=real.dtype,
                device=device,
            )
        made.held = real
        made.allocation = _allocation(real, str(device))
        return made

    def __repr__(self) -> str:
        return f"Pretend({self.held!r}, device={self.device})"

    def data_ptr(self) -> int:
        """The address on the CPU; else all tensors would seem to be tied to each other."""
        return self.held.data_ptr()

    def tolist(self) -> Any:
        """The numbers; torch has none of its own for subclasses."""
        return self.held.tolist()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """Attention runs fused, as on a device that has a kernel for it: no [tokens, tokens]."""
        if function is torch.nn.functional.scaled_dot_product_attention:
            return _run(function, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():  # what comes off the device is a plain tensor
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
        if name == "to":  # reaches here whole in inference mode
            return _to(args[0], (*args[1:], *kwargs.values()))
        return _run(function, args, kwargs)


def _real(value: Any) -> Any:
    return value.held if isinstance(value, Pretend) else value


def _placed(value: Any, device: torch.device) -> Any:
    return Pretend(value, device) if isinstance(value, torch.Tensor) else value


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU; what comes out is on the one device that all inputs are on."""
    flat = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    device = _common_device(function, flat)
    if kwargs.get("device") is not None:
        device = _exact(kwargs["device"])
        kwargs["device"] = "cpu" if device.type == KIND else device
    args, kwargs = pytree.tree_map(_real, (args, kwargs))
    made = function(*args, **kwargs)
    if device.type != KIND:
        return made
    known = {id(x.held): x for x in flat if isinstance(x, Pretend)}
    return pytree.tree_map(
        lambda x: known.get(id(x)) if id(x) in known else _placed(x, device), made
    )


def _common_device(function: Any, tensors: list[torch.Tensor]) -> torch.device:
    """The device of all tensors. Numbers on the CPU may join, and indices, as torch allows."""
    devices = {x.device for x in tensors if isinstance(x, Pretend)}
    takes_indices = "index" in str(function)
    strangers = [x for x in tensors if not isinstance(x, Pretend) and x.ndim > 0]
    if len(devices) > 1 or (devices and strangers and not takes_indices):
        found = sorted({str(x.device) for x in tensors if x.ndim > 0 or isinstance(x, Pretend)})
        raise RuntimeError(
            f"{function}: expected all tensors to be on the same device, found {', '.join(found)}"
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
    """`source.to` in any of its forms: a device, a dtype, or a tensor to be like."""
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
    made = aten._to_copy(_real(source), **options)
    return Pretend(made, device) if device.type == KIND else made


def _exact(device: Any) -> torch.device:
    device = torch.device(device)
    return torch.device(KIND, device.index or 0) if device.type == KIND else device


class _Backend:
    """What torch and the libraries ask of a device module."""

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
    """Make the devices known to torch, in this process, for good."""
    registration._setup_privateuseone_for_python_backend(KIND, backend_module=_Backend())
    _library.impl("empty.memory_format", _empty, "PrivateUse1")
    _library.impl("empty_strided", _empty_strided, "PrivateUse1")
    _library.impl("_copy_from", _copy_from, "PrivateUse1")  # of `torch.tensor(..., device=...)`


_library = torch.library.Library("aten", "IMPL")
