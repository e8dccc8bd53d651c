"""`imagemill doctor`: whether this machine can make images, check by check.

Every check returns a `Finding` and none raises. Looks at files and ports and asks the packages for
their versions; what takes torch is asked of child processes, where it costs this one nothing and
may be broken.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from imagemill.client.errors import StartFailed
from imagemill.local.children import environment
from imagemill.local.up import choose_port
from imagemill.local.up_lock import running
from jobs.catalog import Catalog, load_catalog
from jobs.errors import ConfigurationError, ImagemillError
from jobs.runtime.embedded_queue import find_binary
from jobs.runtime.settings import QueueSettings
from service.settings import ServiceSettings
from workers.process.devices import CPU, accelerators, why_none
from workers.settings import WorkerSettings

Verdict = Literal["ok", "warning", "bad"]

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)
LITTLE_SPACE = 2**30
"""Bytes of free disk below which a warning is due: a thousand large images."""

TORCH_SECONDS = 300
"""An import of torch takes minutes from a slow disk; one that hangs is what is looked for."""

_ASK_TORCH = """
import json, torch
accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
kind = accelerator.type if accelerator else "cpu"
count = torch.accelerator.device_count() if accelerator else 0
names = [torch.cuda.get_device_name(i) for i in range(count)] if kind == "cuda" else []
print(json.dumps({"version": torch.__version__, "kind": kind, "count": count, "names": names}))
"""

_LOOK_OVER = """
import json, sys
from pathlib import Path
from jobs.catalog import load_catalog
from jobs.errors import ConfigurationError, ModelUnavailable
from pipelines.loading.checkpoint import find_checkpoint, look_over
from pipelines.device import check_device
wrong, devices = {}, sys.argv[2:]
for model in load_catalog(Path(sys.argv[1])):
    try:
        if model.local:
            checkpoint = find_checkpoint(model)
            look_over(model, checkpoint)
            for device in list(model.devices) or devices:
                check_device(model, checkpoint, device)
    except (ModelUnavailable, ConfigurationError) as error:
        wrong[model.name] = str(error)
print(json.dumps(wrong))
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
    yield _settings(data, models)
    yield _queue(data)
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
        seen = _asked(_ASK_TORCH)
    except RuntimeError as error:
        yield Finding("torch", "bad", f"{listed} does not import: {error}")
        return
    numbers = tuple(int(part) for part in listed.split("+")[0].split(".")[:2])
    wanted = ".".join(map(str, OLDEST_TORCH))
    is_new = numbers >= OLDEST_TORCH
    detail = listed if is_new else f"{listed}, needs {wanted}"
    yield Finding("torch", "ok" if is_new else "bad", detail)
    yield _devices(seen)


def _asked(program: str, *arguments: str) -> dict[str, Any]:
    """What a child process prints. Raises RuntimeError with the last line of what went wrong."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=TORCH_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(said) from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no answer within {TORCH_SECONDS} s") from error
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _settings(data: Path, models: Path) -> Finding:
    """The `IMAGEMILL_*` variables, as the processes read them at their start."""
    try:
        for kind in (QueueSettings, WorkerSettings, ServiceSettings):
            kind.read(data=data, models=models)
    except ConfigurationError as error:
        return Finding("settings", "bad", str(error))
    return Finding("settings", "ok", "every IMAGEMILL_ variable can be used")


def _devices(seen: dict[str, Any]) -> Finding:
    """What torch sees, next to what the supervisor counts."""
    try:
        counted, reason = accelerators(), why_none()
    except ConfigurationError as error:
        return Finding("devices", "bad", str(error))
    if seen["count"]:
        names = ", ".join(seen["names"]) or seen["kind"]
        return Finding("devices", "ok", f"{seen['count']} {seen['kind']}: {names}")
    if counted != [CPU]:
        listed = f"the driver lists {', '.join(counted)}"
        return Finding("devices", "bad", f"{listed}, but torch {seen['version']} sees none of them")
    small = f"{os.cpu_count()} CPU cores, small models only"
    return Finding("devices", "warning", f"no accelerator ({reason}): {small}")


def _counted() -> list[str]:
    """The devices that workers would get; none where that can't be told."""
    try:
        return accelerators()
    except ConfigurationError:
        return []


def _queue(data: Path) -> Finding:
    """The queue server that would be used: the named one, or the binary of the embedded one."""
    try:
        settings = QueueSettings.read(data=data)
    except ConfigurationError as error:
        return Finding("queue", "bad", str(error))
    if settings.redis_url is not None:
        from jobs.queue.store import Store

        try:
            with closing(Store.connect(settings.redis_url, pool=settings.pool)) as store:
                store.ping()
        except ImagemillError as error:
            return Finding("queue", "bad", f"IMAGEMILL_REDIS_URL: {error}")
        return Finding("queue", "ok", "the server of IMAGEMILL_REDIS_URL answers")
    try:
        binary = find_binary(settings.redis_server)
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=60)
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
    yield from _checkpoints(catalog, path)


def _checkpoints(catalog: Catalog, path: Path) -> Iterator[Finding]:
    """Whether the models' folders are whole and devices fit them; hub ids aren't looked at."""
    try:
        wrong = _asked(_LOOK_OVER, str(path.absolute()), *_counted())
    except RuntimeError as error:
        yield Finding("models", "warning", f"not looked over: {error}")
        return
    for model in catalog:
        where = model.path if model.local else f"{model.path} from the Hugging Face hub"
        said = wrong.get(model.name, where).removeprefix(f"model {model.name!r}: ")
        yield Finding(f"model {model.name}", "bad" if model.name in wrong else "ok", said)


def _port(data: Path, host: str, port: int) -> Finding:
    record = running(data)
    if record is not None:
        return Finding("port", "ok", f"imagemill runs on this folder already, at {record.url}")
    try:
        choose_port(host, port)
    except StartFailed as error:
        return Finding("port", "bad", str(error))
    return Finding("port", "ok", f"{port} on {host} is free")
