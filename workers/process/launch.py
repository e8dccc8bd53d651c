"""A process's place among those started with it: its rank, its device, and what started it.

A process is one worker, or one rank of the group that makes up a worker. It's started by the
supervisor, or by torchrun or `accelerate launch`, which set RANK, WORLD_SIZE and LOCAL_RANK. Never
imports torch.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jobs.catalog import Model
from jobs.errors import ConfigurationError, GroupLost, ModelUnavailable
from jobs.reports import RankProcess
from jobs.runtime import lifeline
from workers.process.devices import accelerators
from workers.settings import WorkerSettings

EXIT_FAILED, EXIT_CONFIGURATION, EXIT_UNLOADABLE, EXIT_GROUP_LOST = 1, 2, 66, 71
"""Exit codes: failed for a reason that may pass; invalid configuration; the model's files can't be
loaded; the group was lost."""

ORPHANED_SECONDS = 3.0
"""How long a worker keeps running its images after its supervisor or launcher was killed."""

LAUNCHER_SECONDS = 20.0
"""Most seconds to drain under a launcher, because torchrun kills processes after 30."""

WATCH_SECONDS = 0.5
"""Seconds between checks whether the launcher is alive."""

GROUP = "IMAGEMILL_GROUP"
"""Environment variable in which the supervisor lists a leader's followers: `PID=DEVICE,...`"""


def exit_code(error: Exception, model: Model) -> int:
    """The exit code of a worker or a rank that couldn't start because of `error`.

    A local folder needs a change first; a model from the hub may be downloaded again.
    """
    if isinstance(error, ConfigurationError):
        return EXIT_CONFIGURATION
    if isinstance(error, ModelUnavailable) and model.local and not error.may_pass:
        return EXIT_UNLOADABLE
    return EXIT_GROUP_LOST if isinstance(error, GroupLost) else EXIT_FAILED


@dataclass(frozen=True, slots=True)
class Place:
    """One process's place.

    `index` is the zero-based position among the model's workers. `rank` counts within the `size`
    processes of a group; a process without a group has rank 0 and size 1. `is_launched` is set if
    torchrun or `accelerate launch` started it.
    """

    device: str
    index: int = 0
    rank: int = 0
    size: int = 1
    is_launched: bool = False

    @property
    def group(self) -> tuple[RankProcess, ...]:
        """Each rank of this leader's group; empty if not known."""
        pairs = [pair.partition("=") for pair in os.environ.get(GROUP, "").split(",") if pair]
        ranks = [(os.getpid(), self.device), *((int(pid), device) for pid, _, device in pairs)]
        known = tuple(RankProcess(i, pid, device) for i, (pid, device) in enumerate(ranks))
        return known if self.size > 1 and not self.is_launched else ()

    def drain_seconds(self, settings: WorkerSettings) -> float:
        """How long running images may take to finish."""
        limit = settings.drain_seconds
        return min(limit, LAUNCHER_SECONDS) if self.is_launched else limit

    def watch_starter(self, on_death: Callable[[], object]) -> bool:
        """Call `on_death` once the supervisor or the launcher has died.

        Returns whether the supervisor started this process. If so, the supervisor handles Ctrl-C.
        """
        if lifeline.watch(on_death):
            return True
        if self.is_launched:
            _watch_parent(on_death)
        return False


def supervised_place(
    model: Model, device: str, index: int, environ: Mapping[str, str] = os.environ
) -> Place:
    """The place of a process started by the supervisor, or by hand with `--device`."""
    if model.ranks == 1:
        return Place(device, index)
    rank, size = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
    return Place(device, index, rank, size)


def launched_place(
    model: Model | None, index: int, environ: Mapping[str, str] = os.environ
) -> Place | None:
    """The place set by torchrun or `accelerate launch`; None if neither started this process.

    Raises ConfigurationError if the model doesn't match the number of processes or devices.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environ.keys():
        return None
    rank, size, local = (int(environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if model is None:
        raise ConfigurationError(
            "--model is required under torchrun or accelerate launch, where each process is one "
            "worker or one rank of it"
        )
    if model.ranks > 1 and size != model.ranks:
        raise ConfigurationError(
            f"model {model.name!r} takes {model.ranks} processes, but the launcher started {size}"
        )
    device = _local_device(model, local, environ)
    if model.ranks > 1:
        return Place(device, index, rank, size, is_launched=True)
    return Place(device, rank, is_launched=True)  # each process is a worker of its own


def _local_device(model: Model, local: int, environ: Mapping[str, str]) -> str:
    """The device of the machine's `local`-th process."""
    if environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return "cpu"
    names = list(model.devices) or accelerators()
    if model.placement == "split" or set(names) == {"cpu"}:
        return names[0]
    if local >= len(names):
        raise ConfigurationError(
            f"model {model.name!r}: no device for process {local + 1} of this machine, "
            f"which has {len(names)}: {', '.join(names)}"
        )
    return names[local]


def _watch_parent(on_death: Callable[[], object]) -> None:
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        on_death()

    threading.Thread(target=watch, name="launcher", daemon=True).start()
