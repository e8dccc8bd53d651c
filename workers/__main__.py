"""`python -m workers`: the supervisor of this machine's workers; with `--model`, one worker."""

import argparse
import os
import sys

from jobs.catalog import load_catalog
from jobs.embedded import redis_url
from jobs.errors import ImagemillError
from jobs.store import Store
from workers.settings import WorkerSettings
from workers.supervisor import Supervisor, accelerators, posts


def main() -> int:
    """Run until told to stop; the exit code, 2 when the settings or the catalog cannot work."""
    args = _parser().parse_args()
    try:
        settings = WorkerSettings.read()
        catalog = load_catalog(settings.models)
        if args.device is None:
            places = posts(catalog, accelerators(), only=args.model, count=args.workers)
            with redis_url(settings):
                return Supervisor(places, settings).run()
        model = catalog.get(args.model)
        os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))
        from workers.worker import Worker  # imports torch, which the supervisor does without

        with redis_url(settings) as url:
            store = Store.connect(url, pool=settings.pool)
            worker = Worker(
                model=model, index=args.index, device=args.device, settings=settings, store=store
            )
            return worker.run()
    except ImagemillError as error:
        sys.stderr.write(f"{error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workers", description=__doc__)
    parser.add_argument("--model", help="only this model's workers")
    parser.add_argument("--device", help="run one worker on this device, such as cuda:0 or cpu")
    parser.add_argument("--index", type=int, default=0, help="which of the model's workers it is")
    parser.add_argument("--workers", type=int, help="how many workers each model gets")
    return parser


if __name__ == "__main__":
    sys.exit(main())
