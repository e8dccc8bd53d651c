"""`imagemill doctor`: checks whether this machine can generate images.

Every check returns a `Finding`; none raises. Checks that need torch run in a child process, because
importing it is slow and may fail or crash.
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
"""Free disk space in bytes below which doctor warns: about a thousand large images."""

TORCH_SECONDS = 300
"""Importing torch can take minutes from a slow disk, so only a hanging import hits this limit."""

_REPORT_TORCH = """
import json, torch
accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
kind = accelerator.type if accelerator else "cpu"
count = torch.accelerator.device_count() if accelerator else 0
names = [torch.cuda.get_device_name(i) for i in range(count)] if kind == "cuda" else []
print(json.dumps({"version": torch.__version__, "kind": kind, "count": count, "names": names}))
"""

_CHECK_MODELS = """
import json, sys
from pathlib import Path
from jobs.catalog import load_catalog
from jobs.errors import ConfigurationError, ModelUnavailable
from pipelines.loading.checkpoint import find_checkpoint, look_over
from pipelines.device import check_device
problems, devices = {}, sys.argv[2:]
for model in load_catalog(Path(sys.argv[1])):
    try:
        if model.local:
            checkpoint = find_checkpoint(model)
            look_over(model, checkpoint)
            for device in list(model.devices) or devices:
                check_device(model, checkpoint, device)
    except (ModelUnavailable, ConfigurationError) as error:
        problems[model.name] = str(error)
print(json.dumps(problems))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: its subject, a verdict and a sentence; `bad` means it can't work."""

    name: str
    verdict: Verdict
    detail: str


def findings(data: Path, models: Path, host: str, port: int) -> Iterator[Finding]:
    """Run all checks, yielding each result as soon as it's known."""
    yield _python()
    yield from _torch()
    yield _settings(data, models)
    yield _queue(data)
    yield _data(data)
    yield from _models(models)
    yield _port(data, host, port)


def _python() -> Finding:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info >= OLDEST_PYTHON:
        return Finding("python", "ok", detail)
    oldest = ".".join(map(str, OLDEST_PYTHON))
    return Finding("python", "bad", f"{detail}; {oldest} or newer is required")


def _torch() -> Iterator[Finding]:
    """torch's version and the devices it sees, from actually importing it in a child process."""
    try:
        installed = version("torch")
    except PackageNotFoundError:
        yield Finding("torch", "bad", "not installed; workers can't run here")
        return
    try:
        report = _run_python(_REPORT_TORCH)
    except RuntimeError as error:
        yield Finding("torch", "bad", f"couldn't import {installed}: {error}")
        return
    numbers = tuple(int(part) for part in installed.split("+")[0].split(".")[:2])
    if numbers >= OLDEST_TORCH:
        yield Finding("torch", "ok", installed)
    else:
        oldest = ".".join(map(str, OLDEST_TORCH))
        yield Finding("torch", "bad", f"{installed}; {oldest} or newer is required")
    yield _devices(report)


def _run_python(program: str, *arguments: str) -> dict[str, Any]:
    """The JSON that a child process prints. Raises RuntimeError with its last line of stderr."""
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
        message = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(message) from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no answer within {TORCH_SECONDS} s") from error
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _settings(data: Path, models: Path) -> Finding:
    """The `IMAGEMILL_*` variables, validated the way the processes do when they start."""
    try:
        for kind in (QueueSettings, WorkerSettings, ServiceSettings):
            kind.read(data=data, models=models)
    except ConfigurationError as error:
        return Finding("settings", "bad", str(error))
    return Finding("settings", "ok", "all IMAGEMILL_ variables are valid")


def _devices(report: dict[str, Any]) -> Finding:
    """The devices that torch sees, compared with those that the supervisor counts."""
    try:
        counted, reason = accelerators(), why_none()
    except ConfigurationError as error:
        return Finding("devices", "bad", str(error))
    if report["count"]:
        names = ", ".join(report["names"]) or report["kind"]
        return Finding("devices", "ok", f"{report['count']} {report['kind']}: {names}")
    if counted != [CPU]:
        detail = f"the driver lists {', '.join(counted)}, but torch {report['version']} finds none"
        return Finding("devices", "bad", detail)
    small = f"{os.cpu_count()} CPU cores, suitable for small models only"
    return Finding("devices", "warning", f"no accelerator ({reason}); {small}")


def _counted() -> list[str]:
    """The devices that workers would get; empty if they can't be determined."""
    try:
        return accelerators()
    except ConfigurationError:
        return []


def _queue(data: Path) -> Finding:
    """The configured queue server, or the binary of the embedded one."""
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
        return Finding("queue", "ok", "the server at IMAGEMILL_REDIS_URL answers")
    try:
        binary = find_binary(settings.redis_server)
        result = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=60)
    except (ConfigurationError, OSError, subprocess.TimeoutExpired) as error:
        return Finding("queue", "bad", str(error))
    return Finding("queue", "ok", f"embedded: {' '.join(result.stdout.split()[:3])}")


def _data(data: Path) -> Finding:
    """Whether the data folder (or its nearest existing parent) is writable, and its free space."""
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
    """Whether local models are complete and fit their devices; hub ids aren't checked."""
    try:
        problems = _run_python(_CHECK_MODELS, str(path.absolute()), *_counted())
    except RuntimeError as error:
        yield Finding("models", "warning", f"not checked: {error}")
        return
    for model in catalog:
        where = model.path if model.local else f"{model.path} from the Hugging Face hub"
        detail = problems.get(model.name, where).removeprefix(f"model {model.name!r}: ")
        yield Finding(f"model {model.name}", "bad" if model.name in problems else "ok", detail)


def _port(data: Path, host: str, port: int) -> Finding:
    record = running(data)
    if record is not None:
        return Finding(
            "port", "ok", f"imagemill is already running on this data folder, at {record.url}"
        )
    try:
        choose_port(host, port)
    except StartFailed as error:
        return Finding("port", "bad", str(error))
    return Finding("port", "ok", f"{port} on {host} is free")
