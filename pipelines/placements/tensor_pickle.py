"""Serialise nested values for other ranks, with their tensors apart from the rest.

`pack` turns a value, such as the arguments of a forward pass, into a small pickled header and ONE
flat tensor of bytes; `unpack` restores the value bit for bit. One tensor takes one collective,
however many arguments there are. Doesn't know about groups and sends nothing.
"""

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch

_ALIGNMENT = 256
"""Alignment in bytes, as CUDA's allocator uses it, so that kernels accept unpacked tensors."""


@dataclass(frozen=True, slots=True)
class Payload:
    """`header` is the pickled value without its tensors; `data` is uint8 [bytes], None if empty."""

    header: bytes
    data: torch.Tensor | None

    @property
    def size(self) -> int:
        """Bytes of `data`."""
        return 0 if self.data is None else self.data.numel()


def pack(value: Any, device: torch.device) -> Payload:
    """Pack `value`: tensors on `device` go into `data`, everything else into the header."""
    stream = io.BytesIO()
    packer = _Packer(stream, device)
    packer.dump(value)
    if not packer.tensors:
        return Payload(stream.getvalue(), None)
    data = torch.empty(packer.size, dtype=torch.uint8, device=device)
    for (start, end), tensor in zip(packer.places, packer.tensors, strict=True):
        data[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return Payload(stream.getvalue(), data)


def unpack(payload: Payload) -> Any:
    """The packed value; its tensors are views of `payload.data`."""
    return _Unpacker(io.BytesIO(payload.header), payload.data).load()


def empty(size: int, device: torch.device) -> torch.Tensor | None:
    """An empty buffer for `size` bytes of data; None for 0."""
    return torch.empty(size, dtype=torch.uint8, device=device) if size else None


class _Packer(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, device: torch.device) -> None:
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self.device = device
        self.tensors: list[torch.Tensor] = []
        self.places: list[tuple[int, int]] = []
        self.size = 0

    def persistent_id(self, value: Any) -> Any:
        """A tensor's place in the data, its dtype and its shape; None pickles the value itself."""
        if not isinstance(value, torch.Tensor) or value.device != self.device:
            return None
        start = self.size
        end = start + value.numel() * value.element_size()
        self.tensors.append(value)
        self.places.append((start, end))
        self.size = -(-end // _ALIGNMENT) * _ALIGNMENT
        return start, end, value.dtype, tuple(value.shape)


class _Unpacker(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, data: torch.Tensor | None) -> None:
        super().__init__(stream)
        self.data = data

    def persistent_load(self, place: Any) -> torch.Tensor:
        """The tensor at that place."""
        assert self.data is not None
        start, end, dtype, shape = place
        return self.data[start:end].view(dtype).view(shape)
