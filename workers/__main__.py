"""Run the supervisor of this machine's workers, or a single worker or rank.

With `--device`, or when started by torchrun or `accelerate launch`, the process is one worker, or
one rank of it, and `--model` names its model.
"""

import argparse
import os
import sys
from dataclasses import replace

import structlog

from jobs.catalog import Catalog, Model, load_catalog
from jobs.errors import ImagemillError, StorageUnavailable
from jobs.queue.store import Store
from jobs.runtime import logs, tracing
from jobs.runtime.embedded_queue import redis_url
from workers.process.devices import CPU, accelerators, seated, why_none
from workers.process.launch import (
    EXIT_CONFIGURATION,
    EXIT_FAILED,
    Place,
    launched_place,
    supervised_place,
)
from workers.process.refusals import Notices
from workers.process.supervisor import Supervisor, posts
from workers.settings import WorkerSettings

log = structlog.get_logger(__name__)


def main() -> int:
    """Run until stopped; returns the exit code, 2 if the settings or the catalog are invalid."""
    args = _parser().parse_args()
    try:
        settings = WorkerSettings.read()
        settings.make_folder()
        logs.configure(settings.log)
        catalog = load_catalog(settings.models)
        place = _place(args, catalog)
        if place is None:
            devices = accelerators()
            places = posts(catalog, devices, only=args.model, count=args.workers)
            if devices == [CPU]:
                log.info("no accelerator found; workers run on the CPU", reason=why_none())
            with redis_url(settings) as url:
                notices = Notices(lambda: Store.connect(url, pool=settings.pool))
                return Supervisor(places, settings, notices).run()
        return _serve(catalog.get(args.model), place, settings)
    except ImagemillError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED if isinstance(error, StorageUnavailable) else EXIT_CONFIGURATION


def _place(args: argparse.Namespace, catalog: Catalog) -> Place | None:
    """Which worker or rank this process is; None if it's the supervisor."""
    if args.device is not None:
        return supervised_place(catalog.get(args.model), args.device, args.index)
    model = None if args.model is None else catalog.get(args.model)
    return launched_place(model, args.index)


def _serve(model: Model, place: Place, settings: WorkerSettings) -> int:
    """Run one worker, or one rank of it."""
    place = replace(place, device=seated(place.device, os.environ))
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))
    tracing.start("imagemill-worker")
    code = _run(model, place, settings)
    if place.size > 1:
        # When the interpreter exits, torch.distributed may wait for a rank or launcher that's gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(model: Model, place: Place, settings: WorkerSettings) -> int:
    if place.rank > 0:
        from workers.process.follower import run_follower  # imports torch, as below

        return run_follower(model, place, settings)
    from workers.process.worker import Worker  # imports torch, which the supervisor does without

    with redis_url(settings) as url:
        store = Store.connect(url, pool=settings.pool)
        return Worker(model=model, place=place, settings=settings, store=store).run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workers", description=__doc__)
    parser.add_argument("--model", help="serve only this model")
    parser.add_argument("--device", help="run one worker on this device, such as cuda:0 or cpu")
    parser.add_argument(
        "--index", type=int, default=0, help="index of this worker among the model's"
    )
    parser.add_argument("--workers", type=int, help="number of workers per model")
    return parser


if __name__ == "__main__":
    sys.exit(main())
