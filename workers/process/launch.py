"""Where a process stands among those that were started with it: ranks, devices, and who started it.

One process is one worker, or one rank of the group that makes one worker. The supervisor starts
both; torchrun and `accelerate launch` do as well, and tell a process its place by RANK, WORLD_SIZE
and LOCAL_RANK. Knows no queue and never imports torch.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.catalog import Model
from jobs.errors import ConfigurationError, GroupLost, ModelUnavailable
from jobs.runtime import lifeline
from workers.process.devices import accelerators
from workers.settings import WorkerSettings

EXIT_FAILED, EXIT_CONFIGURATION, EXIT_UNLOADABLE, EXIT_GROUP_LOST = 1, 2, 66, 71
"""Exit codes of a process that couldn't start for a reason that may pass, that can't work as it is
set up, whose model's files would have to change, that lost its group."""

ORPHANED_SECONDS = 3.0
"""How long a worker whose supervisor or launcher was killed goes on with what it runs."""

LAUNCHER_SECONDS = 20.0
"""How long it drains under a launcher: torchrun kills what is left after 30 seconds."""

WATCH_SECONDS = 0.5
"""Seconds between two looks whether the launcher lives."""

GROUP = "IMAGEMILL_GROUP"
"""Environment variable in which the supervisor tells a leader of its followers: `PID=DEVICE,...`"""


def exit_code(error: Exception, model: Model) -> int:
    """The exit code of a worker or a rank that could not start because of `error`.

    A folder's files don't change by trying again; those of a hub id may be fetched anew.
    """
    if isinstance(error, ConfigurationError):
        return EXIT_CONFIGURATION
    if isinstance(error, ModelUnavailable) and model.local and not error.may_pass:
        return EXIT_UNLOADABLE
    return EXIT_GROUP_LOST if isinstance(error, GroupLost) else EXIT_FAILED


@dataclass(frozen=True, slots=True)
class Place:
    """One process's place.

    `index` says the how-manieth worker of its model it is. `rank` of `size` processes that were
    started together; 0 of 1 for a process of its own. `is_launched` tells a launcher's processes
    from the supervisor's.
    """

    device: str
    index: int = 0
    rank: int = 0
    size: int = 1
    is_launched: bool = False

    @property
    def group(self) -> list[dict[str, Any]]:
        """Rank, process and device of each rank of this leader's group, as far as known here."""
        pairs = [one.partition("=") for one in os.environ.get(GROUP, "").split(",") if one]
        ranks = [(os.getpid(), self.device), *((int(pid), device) for pid, _, device in pairs)]
        known = [{"rank": i, "pid": pid, "device": d} for i, (pid, d) in enumerate(ranks)]
        return known if self.size > 1 and not self.is_launched else []

    def drain_seconds(self, settings: WorkerSettings) -> float:
        """How long what runs may take to finish."""
        limit = settings.drain_seconds
        return min(limit, LAUNCHER_SECONDS) if self.is_launched else limit

    def watch_starter(self, on_death: Callable[[], object]) -> bool:
        """Call `on_death` once when the supervisor or the launcher is gone.

        Whether it is our supervisor, which sees to Ctrl-C itself.
        """
        if lifeline.watch(on_death):
            return True
        if self.is_launched:
            _watch_parent(on_death)
        return False


def supervised_place(
    model: Model, device: str, index: int, environ: Mapping[str, str] = os.environ
) -> Place:
    """The place that the supervisor gave this process, or the one who started it by hand."""
    if model.ranks == 1:
        return Place(device, index)
    rank, size = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
    return Place(device, index, rank, size)


def launched_place(
    model: Model | None, index: int, environ: Mapping[str, str] = os.environ
) -> Place | None:
    """The place that torchrun or `accelerate launch` gave this process; None without a launcher.

    Raises ConfigurationError when the entry cannot be served by that many processes here.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environ.keys():
        return None
    rank, size, local = (int(environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if model is None:
        raise ConfigurationError(
            "under a launcher each process is one worker or one rank of it: name the model, --model"
        )
    if model.ranks > 1 and size != model.ranks:
        raise ConfigurationError(
            f"model {model.name!r} takes {model.ranks} processes, and the launcher started {size}"
        )
    device = _local_device(model, local, environ)
    if model.ranks > 1:
        return Place(device, index, rank, size, is_launched=True)
    return Place(device, rank, is_launched=True)  # a worker of its own, and one of many


def _local_device(model: Model, local: int, environ: Mapping[str, str]) -> str:
    """The device of the machine's `local`-th process."""
    if environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return "cpu"
    names = list(model.devices) or accelerators()
    if model.placement == "split" or set(names) == {"cpu"}:
        return names[0]
    if local >= len(names):
        raise ConfigurationError(
            f"model {model.name!r}: process {local + 1} of this machine has no device, "
            f"there are {len(names)}: {', '.join(names)}"
        )
    return names[local]


def _watch_parent(on_death: Callable[[], object]) -> None:
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        on_death()

    threading.Thread(target=look, name="launcher", daemon=True).start()
