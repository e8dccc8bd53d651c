"""Read the header of one weight file: its tensors' names, shapes and dtypes, without the data.

Supports safetensors and GGUF. Files often mistaken for one of them (a pickle, a web page, a Git LFS
pointer, half a download) are refused with advice. This module doesn't depend on any model.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from jobs.errors import ModelUnavailable, first_line
from pipelines.loading.transient import may_pass

SAFETENSORS, GGUF = ".safetensors", ".gguf"
SUFFIXES = (SAFETENSORS, GGUF)
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")

CONVERT = (
    "is a pickle, which can run code when it's loaded; convert it to safetensors on a machine that "
    'you can afford to lose: `python -c "import torch, safetensors.torch as s; w = torch.load('
    "'FILE', map_location='cpu', weights_only=True); w = w.get('state_dict', w); s.save_file({k: "
    "v.contiguous() for k, v in w.items() if torch.is_tensor(v)}, 'FILE.safetensors')\"`"
)
"""Why pickles are refused, and how to convert a single file."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_GGUF_DTYPES = {"F32": torch.float32, "F16": torch.float16}
"""Unquantized GGUF types; all others are bytes."""


@dataclass(frozen=True, slots=True)
class Header:
    """One file's header. `tensors` are on the meta device, with the shape and dtype in the file.

    A quantized tensor of a GGUF is a `GGUFParameter` of bytes, as diffusers reads it, so that
    diffusers' own name conversions can run over the header. `types` counts the tensors per dtype or
    quantization. `metadata` is the file's own.
    """

    path: Path
    tensors: Mapping[str, torch.Tensor]
    types: Mapping[str, int]
    metadata: Mapping[str, Any]

    @property
    def is_gguf(self) -> bool:
        """Whether the file is a GGUF, whose weights stay quantized in memory."""
        return self.path.suffix.lower() == GGUF


def read_header(path: Path) -> Header:
    """Read the header of a complete weight file. Raises ModelUnavailable, naming the file."""
    start = _start(path)
    # A safetensors file begins with a little-endian length of eight bytes. The first two may be
    # those of a pickle or a zip archive by chance, but the others are zero.
    is_pickle = start.startswith((b"PK", b"\x80")) and any(start[2:8])
    if start and (is_pickle or path.suffix.lower() in PICKLES):
        raise ModelUnavailable(f"{path} {CONVERT}")
    _refuse_other_text(path, start)
    is_gguf, says_gguf = start.startswith(b"GGUF"), path.suffix.lower() == GGUF
    if path.suffix.lower() not in SUFFIXES:
        raise ModelUnavailable(f"{path} is neither a {SAFETENSORS} nor a {GGUF} file")
    if is_gguf and not says_gguf:
        raise ModelUnavailable(f"{path} is actually a GGUF file; rename it to end in {GGUF}")
    if says_gguf and not is_gguf:
        raise ModelUnavailable(
            f"{path} isn't a GGUF file; if it's safetensors, rename it to end in {SAFETENSORS}"
        )
    header = _gguf(path) if is_gguf else _safetensors(path)
    if not header.tensors:
        raise ModelUnavailable(f"{path} has no tensors")
    return header


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except FileNotFoundError:
        raise ModelUnavailable(f"the file {path} is missing") from None
    except OSError as error:
        raise ModelUnavailable(f"can't read {path}: {error}", may_pass=may_pass(error)) from error


def _refuse_other_text(path: Path, start: bytes) -> None:
    """Raise for an empty file, a Git LFS pointer, and a web page or JSON saved by a download."""
    if not start:
        raise ModelUnavailable(f"{path} is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise ModelUnavailable(
            f"{path} is only a Git LFS pointer to the weights; run `git lfs pull` to fetch them"
        )
    text = b"" if 0 in start[:8] else start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"{", b"[")):
        kind = "JSON" if text[:1] in b"{[" else "a web page"
        raise ModelUnavailable(
            f"{path} is {kind}, not weights: the server probably sent an error or a login page; "
            "download the file again"
        )


def _safetensors(path: Path) -> Header:
    try:
        with safe_open(path, framework="pt"):  # checks the file's length
            pass
        with path.open("rb") as file:
            [length] = struct.unpack("<Q", file.read(8))
            document = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise ModelUnavailable(
            f"{path} is truncated or corrupt ({first_line(error)}); download it again",
            may_pass=may_pass(error),
        ) from error
    metadata = document.pop("__metadata__", None) or {}
    tensors, types = {}, dict[str, int]()
    for name, entry in document.items():
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ModelUnavailable(f"{path}: {name} has the unknown dtype {entry['dtype']}")
        tensors[name] = torch.empty(entry["shape"], dtype=dtype, device="meta")
        types[entry["dtype"]] = types.get(entry["dtype"], 0) + 1
    return Header(path, tensors, types, metadata)


def _gguf(path: Path) -> Header:
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFParameter
    from gguf import GGMLQuantizationType, GGUFReader

    try:
        reader = GGUFReader(path)
    except Exception as error:  # a corrupt file raises various errors of numpy and the reader
        raise ModelUnavailable(
            f"{path} is truncated or corrupt ({first_line(error)}); download it again",
            may_pass=may_pass(error),
        ) from error
    plain = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
    tensors, types = {}, dict[str, int]()
    for entry in reader.tensors:
        kind = entry.tensor_type
        if kind not in plain and kind not in SUPPORTED_GGUF_QUANT_TYPES:
            known = ", ".join(t.name for t in (*plain, *SUPPORTED_GGUF_QUANT_TYPES))
            raise ModelUnavailable(
                f"{path}: {entry.name} is quantized as {kind.name}, which diffusers can't read; "
                f"use a file with one of {known}"
            )
        dtype = _GGUF_DTYPES.get(kind.name, torch.uint8)
        tensor = torch.empty(tuple(map(int, entry.data.shape)), dtype=dtype, device="meta")
        is_quantized = kind not in plain
        tensors[entry.name] = GGUFParameter(tensor, quant_type=kind) if is_quantized else tensor
        types[kind.name] = types.get(kind.name, 0) + 1
    names = ("general.architecture", "general.name")
    fields = {name: reader.fields[name].contents() for name in names if name in reader.fields}
    return Header(path, tensors, types, fields)
