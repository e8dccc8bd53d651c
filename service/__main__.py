"""`python -m service`: the HTTP service under uvicorn, until a signal or its parent's death.

Reads the settings once, finds or starts the queue server, and stops gracefully: SIGTERM or Ctrl-C
lets requests in flight finish.
"""

import argparse
import gc
import signal
import socket
import sys
from collections.abc import Sequence

import uvicorn

from jobs.catalog import load_catalog
from jobs.errors import ImagemillError
from jobs.image_store import LocalImages
from jobs.queue.store import Store
from jobs.runtime import lifeline, logs, tracing
from jobs.runtime.embedded_queue import redis_url
from service.app import create_app
from service.http.auth import check_reach
from service.keys import KeyRing
from service.read.events import EventHub
from service.settings import ServiceSettings

SWITCH_SECONDS = 0.0005
"""How long a thread may keep the interpreter from others that wait for it; Python's own is ten
times that."""

GRACE_SECONDS = 5
"""How long a stopping server waits for requests in flight."""


class _Server(uvicorn.Server):
    """Answers waiting requests first when it stops, so that they do not use up the grace."""

    def __init__(self, config: uvicorn.Config, hub: EventHub) -> None:
        super().__init__(config)
        self._hub = hub

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the waits, then as uvicorn does."""
        self._hub.close()
        await super().shutdown(sockets)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop; 0 after a graceful end, 2 when the set-up cannot work."""
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    try:
        settings = _settings(arguments)
        settings.make_folder()
        logs.configure(settings.log)
        tracing.start("imagemill-service")
        _serve(settings)
    except ImagemillError as error:
        sys.stderr.write(f"imagemill service: {error}\n")
        return 2
    return 0


def _settings(arguments: Sequence[str] | None) -> ServiceSettings:
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__)
    parser.add_argument("--host", help="address to listen on; default: this machine only")
    parser.add_argument("--port", type=int, help="port to listen on; 0 picks a free one")
    flags = vars(parser.parse_args(arguments))
    return ServiceSettings.read(
        **{name: value for name, value in flags.items() if value is not None}
    )


def _serve(settings: ServiceSettings) -> None:
    catalog = load_catalog(settings.models)
    check_reach(settings, KeyRing(settings.data / "keys.json"))
    images = LocalImages(settings.data / "images")
    with redis_url(settings) as url:
        store = Store.connect(url, pool=settings.pool)
        app = create_app(settings, store, images, catalog)
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            timeout_graceful_shutdown=GRACE_SECONDS,
            server_header=False,
            log_config=None,
            access_log=False,
        )
        server = _Server(config, app.state.context.hub)
        lifeline.watch(lambda: setattr(server, "should_exit", True))
        _make_prompt()
        server.run()


def _make_prompt() -> None:
    """Spare requests two waits of the interpreter's; `python -m bench submits` shows them.

    What is loaded by now stays, so the collector need not walk it again and again; and a thread
    that needs the interpreter, as each request's does after each answer of the queue's, gets it
    sooner from one that computes.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_SECONDS)


def _leave(*_: object) -> None:
    """End by unwinding, so that the queue server is stopped in order."""
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
