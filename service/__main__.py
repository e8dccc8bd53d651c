"""`python -m service`: the HTTP service under uvicorn, until a signal or its parent's exit.

Reads the settings once, finds or starts the queue server, and shuts down gracefully: on SIGTERM or
Ctrl-C, requests in flight can finish.
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
"""The interpreter's switch interval: how long a thread can hold the GIL while others wait for it. A
tenth of Python's default."""

GRACE_SECONDS = 5
"""How long a server that shuts down waits for requests in flight."""


class _Server(uvicorn.Server):
    """On shutdown, first ends long polls and streams, which would otherwise use up the grace."""

    def __init__(self, config: uvicorn.Config, hub: EventHub) -> None:
        super().__init__(config)
        self._hub = hub

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End all waits, then shut down."""
        self._hub.close()
        await super().shutdown(sockets)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until stopped; returns 0 after a graceful shutdown, 2 for a configuration error."""
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
    """Reduce two delays of requests by the interpreter; `python -m bench submits` measures them.

    Objects that exist by now live forever, so the garbage collector shouldn't scan them repeatedly.
    And a request's thread needs the GIL after each response of the queue; with a shorter switch
    interval, it gets the GIL sooner from a thread that computes.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_SECONDS)


def _leave(*_: object) -> None:
    """Exit by unwinding, so that the queue server is shut down properly."""
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
