"""Which accelerators this machine's workers run on: what the driver lists, as the user allows it.

`CUDA_VISIBLE_DEVICES` is read as CUDA reads it (CUDA C++ Programming Guide, "CUDA Environment
Variables"), except that a value with a mistake in it is refused. CUDA would hide devices, or all of
them, and say nothing. Pure functions but for `accelerators`, and never imports torch.
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
    """A GPU that the driver lists: its UUID, and those of its MIG slices if it is cut."""

    uuid: str
    slices: tuple[str, ...] = ()


def listed_gpus(text: str) -> list[Gpu]:
    """The GPUs in the output of `nvidia-smi -L`, in its order."""
    gpus: list[Gpu] = []
    for line in text.splitlines():
        if whole := _GPU.match(line):
            gpus.append(Gpu(whole[2]))
        elif (part := _SLICE.match(line)) and gpus:
            gpus[-1] = Gpu(gpus[-1].uuid, (*gpus[-1].slices, part[1]))
    return gpus


def visible_devices(value: str | None, gpus: Sequence[Gpu]) -> list[str]:
    """Names of the devices that workers may use, none of them twice.

    `value` is that of CUDA_VISIBLE_DEVICES, None where it isn't set. A GPU is `cuda:0` and so on,
    counted among the visible ones. Where one of them is cut into MIG slices, devices are named by
    UUID, each slice one, because a process can use only one slice: see `seated`. Raises
    ConfigurationError.
    """
    chosen = list(gpus) if value is None else list(_chosen(value, gpus))
    if any(gpu.slices for gpu in chosen):
        return [uuid for gpu in chosen for uuid in (gpu.slices or (gpu.uuid,))]
    return [f"cuda:{index}" for index in range(len(chosen))]


def seated(device: str, environ: MutableMapping[str, str]) -> str:
    """The name by which torch knows a device in this process.

    A device named by UUID is made the only visible one. Call it before torch is imported.
    """
    if not device.startswith(_BY_UUID):
        return device
    environ[VISIBLE] = device
    return "cuda:0"


def is_slice(device: str) -> bool:
    """Whether a device is a MIG slice, which can't be part of a group of ranks."""
    return device.startswith("MIG-")


def accelerators() -> list[str]:
    """Devices of this machine: `cuda:0`..., UUIDs where there are MIG slices, or `cpu` if none.

    Raises ConfigurationError when CUDA_VISIBLE_DEVICES has a mistake in it.
    """
    return visible_devices(os.environ.get(VISIBLE), listed_gpus(driver_list()[0])) or [CPU]


def driver_list() -> tuple[str, str]:
    """What `nvidia-smi -L` prints; and why that is nothing, as a sentence without a full stop."""
    lister = shutil.which("nvidia-smi")
    if lister is None:
        return "", "nvidia-smi isn't on PATH"
    done = subprocess.run([lister, "-L"], capture_output=True, text=True, check=False)
    if _GPU.search(done.stdout):
        return done.stdout, ""
    said = (done.stdout + done.stderr).strip().splitlines()
    return "", f"nvidia-smi lists no GPU{f': {said[0]}' if said else ''}"


def why_none() -> str:
    """Why `accelerators` finds only the CPU; empty if it finds more."""
    text, reason = driver_list()
    if reason or visible_devices(os.environ.get(VISIBLE), listed_gpus(text)):
        return reason
    return f"{VISIBLE}={os.environ.get(VISIBLE)!r} hides every GPU"


def _chosen(value: str, gpus: Sequence[Gpu]) -> Iterator[Gpu]:
    """The GPUs that the variable names, a MIG slice as a GPU that has only that slice."""
    names = [name.strip() for name in value.split(",")]
    if names == [""] or names == ["NoDevFiles"]:  # what container runtimes set to hide all
        return
    seen: set[str] = set()
    for name in names:
        if re.fullmatch(r"-\d+", name):  # as CUDA does: it and all that follow are hidden
            return
        if name[:4] != names[0][:4] and {name[:4], names[0][:4]} & set(_BY_UUID):
            raise _wrong(value, "mixes numbers, GPU-... and MIG-..., of which CUDA reads one kind")
        find = _by_uuid if name.startswith(_BY_UUID) else _by_number
        gpu = find(name, value, gpus)
        uuids = set(gpu.slices or (gpu.uuid,))
        if uuids & seen:
            raise _wrong(value, f"names {name} twice, for which CUDA hides every GPU")
        seen |= uuids
        yield gpu


def _by_number(name: str, value: str, gpus: Sequence[Gpu]) -> Gpu:
    if not re.fullmatch(r"\+?\d+", name):
        raise _wrong(value, f"has {name!r}, which is neither a number nor GPU-... nor MIG-...")
    if int(name) >= len(gpus):
        raise _wrong(value, f"names GPU {int(name)}, but the driver lists {len(gpus)}")
    return gpus[int(name)]


def _by_uuid(name: str, value: str, gpus: Sequence[Gpu]) -> Gpu:
    """The one GPU or slice whose UUID begins so; CUDA takes shortened ones too."""
    known = [*gpus, *(Gpu(gpu.uuid, (one,)) for gpu in gpus for one in gpu.slices)]
    fits = [g for g in known if (g.slices[0] if g not in gpus else g.uuid).startswith(name)]
    if len(fits) != 1:
        count = "no" if not fits else "more than one"
        raise _wrong(value, f"has {name}, and the driver lists {count} such device")
    return fits[0]


def _wrong(value: str, detail: str) -> ConfigurationError:
    return ConfigurationError(f"{VISIBLE}={value!r} {detail}")
