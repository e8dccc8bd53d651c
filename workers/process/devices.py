"""Finds this machine's accelerators: those that the driver lists and the user allows.

Reads `CUDA_VISIBLE_DEVICES` as CUDA does (CUDA C++ Programming Guide, "CUDA Environment
Variables"), except that an invalid value is an error. CUDA would silently hide some devices or all
of them. Never imports torch.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass

from jobs.errors import ConfigurationError

VISIBLE = "CUDA_VISIBLE_DEVICES"
CPU = "cpu"

_GPU = re.compile(r"GPU (\d+): .*\(UUID: (\S+)\)")
_SLICE = re.compile(r"\s+MIG .*\(UUID: (\S+)\)")
_BY_UUID = ("GPU-", "MIG-")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU listed by the driver: its UUID, and those of its MIG slices, if any."""

    uuid: str
    slices: tuple[str, ...] = ()


def listed_gpus(text: str) -> list[Gpu]:
    """Parse the output of `nvidia-smi -L`; keeps its order."""
    gpus: list[Gpu] = []
    for line in text.splitlines():
        if whole := _GPU.match(line):
            gpus.append(Gpu(whole[2]))
        elif (part := _SLICE.match(line)) and gpus:
            gpus[-1] = Gpu(gpus[-1].uuid, (*gpus[-1].slices, part[1]))
    return gpus


def visible_devices(value: str | None, gpus: Sequence[Gpu]) -> list[str]:
    """Names of the devices that workers may use, without duplicates.

    `value` is CUDA_VISIBLE_DEVICES, or None if it isn't set. GPUs are named `cuda:0` and so on,
    counting only the visible ones. If any has MIG slices, all devices are named by UUID instead and
    each slice is one device, because a process can use only one slice: see `seated`. Raises
    ConfigurationError.
    """
    chosen = list(gpus) if value is None else list(_chosen(value, gpus))
    if any(gpu.slices for gpu in chosen):
        return [uuid for gpu in chosen for uuid in (gpu.slices or (gpu.uuid,))]
    return [f"cuda:{index}" for index in range(len(chosen))]


def seated(device: str, environ: MutableMapping[str, str]) -> str:
    """Return torch's name for a device in this process.

    Makes a device named by UUID the only visible one. Call it before torch is imported.
    """
    if not device.startswith(_BY_UUID):
        return device
    environ[VISIBLE] = device
    return "cuda:0"


def is_slice(device: str) -> bool:
    """Whether a device is a MIG slice, which can't be part of a group of ranks."""
    return device.startswith("MIG-")


def accelerators() -> list[str]:
    """Devices of this machine: `cuda:0`..., UUIDs if there are MIG slices, `cpu` if there are none.

    Raises ConfigurationError if CUDA_VISIBLE_DEVICES is invalid.
    """
    return visible_devices(os.environ.get(VISIBLE), listed_gpus(driver_list()[0])) or [CPU]


def driver_list() -> tuple[str, str]:
    """Output of `nvidia-smi -L`, and the reason if it lists no GPU (without a full stop)."""
    lister = shutil.which("nvidia-smi")
    if lister is None:
        return "", "nvidia-smi isn't on PATH"
    done = subprocess.run([lister, "-L"], capture_output=True, text=True, check=False)
    if _GPU.search(done.stdout):
        return done.stdout, ""
    lines = (done.stdout + done.stderr).strip().splitlines()
    return "", f"nvidia-smi lists no GPU{f': {lines[0]}' if lines else ''}"


def why_none() -> str:
    """Why `accelerators` finds only the CPU; empty if it finds more."""
    text, reason = driver_list()
    if reason or visible_devices(os.environ.get(VISIBLE), listed_gpus(text)):
        return reason
    return f"{VISIBLE}={os.environ.get(VISIBLE)!r} hides every GPU"


def _chosen(value: str, gpus: Sequence[Gpu]) -> Iterator[Gpu]:
    """The GPUs that the variable names; a MIG slice becomes a GPU with only that slice."""
    names = [name.strip() for name in value.split(",")]
    if names == [""] or names == ["NoDevFiles"]:  # container runtimes set these to hide all
        return
    seen: set[str] = set()
    for name in names:
        if re.fullmatch(r"-\d+", name):  # as in CUDA, this hides it and all that follow
            return
        if name[:4] != names[0][:4] and {name[:4], names[0][:4]} & set(_BY_UUID):
            raise _invalid(value, "mixes numbers, GPU-... and MIG-...; CUDA accepts only one kind")
        find = _by_uuid if name.startswith(_BY_UUID) else _by_number
        gpu = find(name, value, gpus)
        uuids = set(gpu.slices or (gpu.uuid,))
        if uuids & seen:
            raise _invalid(value, f"names {name} twice, which makes CUDA hide every GPU")
        seen |= uuids
        yield gpu


def _by_number(name: str, value: str, gpus: Sequence[Gpu]) -> Gpu:
    if not re.fullmatch(r"\+?\d+", name):
        raise _invalid(value, f"has {name!r}; expected a number, GPU-... or MIG-...")
    if int(name) >= len(gpus):
        raise _invalid(value, f"names GPU {int(name)}, but the driver lists {len(gpus)}")
    return gpus[int(name)]


def _by_uuid(name: str, value: str, gpus: Sequence[Gpu]) -> Gpu:
    """The only GPU or slice whose UUID starts with `name`; CUDA accepts prefixes too."""
    known = [*gpus, *(Gpu(gpu.uuid, (part,)) for gpu in gpus for part in gpu.slices)]
    matches = [g for g in known if (g.slices[0] if g not in gpus else g.uuid).startswith(name)]
    if len(matches) != 1:
        count = "no" if not matches else "more than one"
        raise _invalid(value, f"has {name}, but the driver lists {count} matching device")
    return matches[0]


def _invalid(value: str, detail: str) -> ConfigurationError:
    return ConfigurationError(f"{VISIBLE}={value!r} {detail}")
