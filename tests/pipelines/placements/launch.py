"""Start groups of real processes, in the environment that the supervisor or torchrun would set.

They're forked from one server that has imported torch and diffusers, because that takes seconds.
"""

import json
import multiprocessing
import os
import random
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.waiting import LONG_PATIENCE

NEVER = 2 * LONG_PATIENCE
"""Timeout of collectives, in seconds, in tests that aren't about timeouts; longer than any wait."""

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([f"{__package__}.{name}" for name in ("rank", "bare")])


def free_port() -> int:
    """A port to bind later, below those that the system assigns, so nothing takes it first."""
    while True:
        port = random.randrange(10_000, 30_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def start(
    module: str, world: int, folder: Path, *arguments: str, leader: Sequence[str] = ()
) -> list[ForkServerProcess]:
    """Run `main(*arguments)` of a module here, one process per rank, with its output in `folder`.

    `leader` has the leader's address as each rank sees it.
    """
    port = str(free_port())
    processes = []
    for rank in range(world):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": leader[rank] if leader else "127.0.0.1",
            "MASTER_PORT": port,
        }
        log = folder / f"rank{rank}.log"
        process = SERVER.Process(target=run, args=(module, environment, log, arguments))
        process.start()
        processes.append(process)
    return processes


def run(module: str, environment: dict[str, str], log: Path, arguments: tuple[str, ...]) -> None:
    """The body of the process."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    sys.exit(import_module(f"{__package__}.{module}").main(*arguments))


def code_of(process: ForkServerProcess) -> int:
    """The exit code. Raises TimeoutError if the process doesn't end."""
    process.join(LONG_PATIENCE)
    if process.exitcode is None:
        raise TimeoutError(f"process {process.pid} has not ended after {LONG_PATIENCE} seconds")
    return process.exitcode


def run_cases(world: int, folder: Path, cases: list[dict[str, Any]]) -> list[Any]:
    """Each rank's results, as a dict by the case's name; one launch runs all cases."""
    for case in cases:
        case["port"] = free_port()
    path = folder / "plan.json"
    path.write_text(json.dumps({"cases": cases}))
    processes = start("rank", world, folder, str(path))
    try:
        codes = [code_of(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    for rank, code in enumerate(codes):
        assert code == 0, (folder / f"rank{rank}.log").read_text()[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]
