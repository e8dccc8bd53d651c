"""`imagemill doctor`: whether this machine can make images, check by check.

Every check returns a `Finding` and none raises. Looks at files and ports and asks the packages for
their versions; imports torch only in a child process, where it costs this one nothing.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from imagemill.children import environment
from imagemill.errors import StartFailed
from imagemill.running import running
from imagemill.up import choose_port
from jobs.catalog import Model, load_catalog
from jobs.embedded import find_binary
from jobs.errors import ConfigurationError, ImagemillError

Verdict = Literal["ok", "warning", "bad"]

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)
LITTLE_SPACE = 2**30
"""Bytes of free disk below which a warning is due: a thousand large images."""

TORCH_SECONDS = 60

_ASK_TORCH = """
import json, torch
accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
kind = accelerator.type if accelerator else "cpu"
count = torch.accelerator.device_count() if accelerator else 0
names = [torch.cuda.get_device_name(i) for i in range(count)] if kind == "cuda" else []
print(json.dumps({"version": torch.__version__, "kind": kind, "count": count, "names": names}))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was looked at, how it is, and a sentence. `bad` means: cannot work."""

    name: str
    verdict: Verdict
    detail: str


def findings(data: Path, models: Path, host: str, port: int) -> Iterator[Finding]:
    """All checks, each as soon as it is done."""
    yield _python()
    yield from _torch()
    yield _queue(os.environ.get("IMAGEMILL_REDIS_URL"))
    yield _data(data)
    yield from _models(models)
    yield _port(data, host, port)


def _python() -> Finding:
    wanted = ".".join(map(str, OLDEST_PYTHON))
    is_new = sys.version_info >= OLDEST_PYTHON
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding(
        "python", "ok" if is_new else "bad", detail + f" (needs {wanted})" * (not is_new)
    )


def _torch() -> Iterator[Finding]:
    """torch's version and the devices it sees; the child process's import is the proof."""
    try:
        listed = version("torch")
    except PackageNotFoundError:
        yield Finding("torch", "bad", "not installed; workers cannot run here")
        return
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=TORCH_SECONDS,
            check=True,
        )
        seen: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding("torch", "bad", f"{listed} does not import: {said}")
        return
    except subprocess.TimeoutExpired:
        yield Finding("torch", "bad", f"{listed} does not import within {TORCH_SECONDS} s")
        return
    numbers = tuple(int(part) for part in listed.split("+")[0].split(".")[:2])
    wanted = ".".join(map(str, OLDEST_TORCH))
    is_new = numbers >= OLDEST_TORCH
    detail = listed if is_new else f"{listed}, needs {wanted}"
    yield Finding("torch", "ok" if is_new else "bad", detail)
    yield _devices(seen)


def _devices(seen: dict[str, Any]) -> Finding:
    if seen["count"]:
        names = ", ".join(seen["names"]) or seen["kind"]
        return Finding("devices", "ok", f"{seen['count']} {seen['kind']}: {names}")
    cores = os.cpu_count()
    return Finding("devices", "warning", f"no accelerator: {cores} CPU cores, small models only")


def _queue(redis_url: str | None) -> Finding:
    """The queue server that would be used: the named one, or the binary of the embedded one."""
    if redis_url:
        from jobs.store import Store

        try:
            Store.connect(redis_url).ping()
        except ImagemillError as error:
            return Finding("queue", "bad", f"IMAGEMILL_REDIS_URL: {error}")
        return Finding("queue", "ok", "the server of IMAGEMILL_REDIS_URL answers")
    try:
        explicit = os.environ.get("IMAGEMILL_REDIS_SERVER")
        binary = find_binary(Path(explicit) if explicit else None)
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10)
    except (ConfigurationError, OSError, subprocess.TimeoutExpired) as error:
        return Finding("queue", "bad", str(error))
    return Finding("queue", "ok", f"embedded: {' '.join(said.stdout.split()[:3])}")


def _data(data: Path) -> Finding:
    """Whether the data folder, or the nearest parent that is there, takes files; and its space."""
    folder = data.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("data folder", "bad", f"{data}: {error.strerror}")
    detail = f"{data}, {free / 2**30:.1f} GiB free"
    return Finding("data folder", "warning" if free < LITTLE_SPACE else "ok", detail)


def _models(path: Path) -> Iterator[Finding]:
    try:
        catalog = load_catalog(path)
    except ConfigurationError as error:
        yield Finding("models", "bad", str(error))
        return
    for model in catalog:
        problem = missing_part(model)
        where = model.path if model.local else f"{model.path} from the Hugging Face hub"
        name = f"model {model.name}"
        yield Finding(name, "bad" if problem else "ok", problem or where)


def missing_part(model: Model) -> str | None:
    """What a local diffusers folder lacks, as a sentence; None where all seems there.

    Looks for each component's config and for its weights, every shard of an index included, and
    at the headers of safetensors files against their sizes. Says nothing about hub ids.
    """
    if not model.local:
        return None
    folder = Path(model.path)
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except FileNotFoundError:
        return f"{folder / 'model_index.json'} is missing"
    except (OSError, ValueError) as error:
        return f"{folder / 'model_index.json'} cannot be read: {error}"
    for name, kind in index.items():
        if not name.startswith("_") and isinstance(kind, list) and kind[0]:
            problem = _missing_in(folder / name, str(kind[1]))
            if problem:
                return problem
    return None


def _missing_in(folder: Path, kind: str) -> str | None:
    if not folder.is_dir() or not any(folder.iterdir()):
        return f"{folder} is missing or empty"
    if "Tokenizer" in kind or "Scheduler" in kind or "Processor" in kind:
        return None
    wanted: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        try:
            wanted |= set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError) as error:
            return f"{index} cannot be read: {error}"
    files = [folder / name for name in wanted] or sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("*.bin")):
        return f"{folder} holds no weights"
    return next(filter(None, map(_broken, files)), None)


def _broken(path: Path) -> str | None:
    """A safetensors file starts with its header's length and ends where the header says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < size else None
    except FileNotFoundError:
        return f"{path} is missing"
    except (OSError, ValueError) as error:
        return f"{path} cannot be read: {error}"
    if header is None:
        return f"{path} is cut short or no safetensors file"
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if 8 + length + max(ends, default=0) != size:
        return f"{path} has {size} bytes, its header promises {8 + length + max(ends, default=0)}"
    return None


def _port(data: Path, host: str, port: int) -> Finding:
    record = running(data)
    if record is not None:
        return Finding("port", "ok", f"imagemill runs on this folder already, at {record.url}")
    try:
        choose_port(host, port)
    except StartFailed as error:
        return Finding("port", "bad", str(error))
    return Finding("port", "ok", f"{port} on {host} is free")
