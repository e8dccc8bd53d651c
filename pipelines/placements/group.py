"""A group of ranks, one process each, that make one worker: joined, told what to do, dismissed.

Rank 0 leads and is an ordinary worker; the others follow. Orders go over a socket from the leader
to each follower, tensors by collectives of torch.distributed. The sockets are what makes the group
safe: nothing waits in a collective while there is no work, so that idleness trips no timeout, and
a rank that dies closes its end, which every rank that is connected to it sees at once. The leader
is connected to all; the others hang on the leader and fall with it.

Once anything raises within a forward pass the group is lost for good, since other ranks may be
inside a collective: the processes end and are started anew. Knows no model.
"""

import os
import pickle
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import structlog
import torch
import torch.distributed as dist

from jobs.catalog import Model
from jobs.errors import ConfigurationError, GroupLost, PipelineError
from pipelines.device import use_device
from pipelines.placements.rendezvous import Conn, connect
from pipelines.placements.tensor_pickle import Parcel, empty, pack, unpack

GROUP_SECONDS = 60.0
"""How long a rank may be late for a collective once the group is steady."""

START_SECONDS = 1800.0
"""The same while the group starts: ranks load weights at different speeds."""

JOIN_SECONDS = 300.0
"""How long the ranks' processes may take to find each other."""

NCCL_SECONDS = 2 * START_SECONDS
"""NCCL's own patience, so long that ours ends first."""

GRACE_SECONDS = 3.0
"""How long the reason of a loss may be on its way after the loss itself."""

POLL_SECONDS = 0.0002
"""How often a device is asked whether it has ended."""

Handler = Callable[[Any], None]

log = structlog.get_logger(__name__)


def rank_of_environment() -> int:
    """RANK as a launcher sets it, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def check_world(model: Model) -> None:
    """Raise ConfigurationError unless the environment has exactly the model's ranks."""
    missing = [
        n for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ
    ]
    if missing:
        raise ConfigurationError(
            f"placement {model.placement!r} takes {model.ranks} processes; "
            f"{', '.join(missing)} not set, as the supervisor or torchrun would"
        )
    world = int(os.environ["WORLD_SIZE"])
    if world != model.ranks:
        raise ConfigurationError(
            f"placement {model.placement!r} takes {model.ranks} processes "
            f"({_degrees(model)}), but WORLD_SIZE is {world}"
        )


def check_devices(device: torch.device) -> None:
    """Raise ConfigurationError when this rank's device is not there."""
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"rank {rank_of_environment()} wants {device}, "
            f"but there are only {torch.cuda.device_count()} CUDA devices"
        )


def join(model: Model, device: str) -> "Group":
    """Join the group that the environment describes; returns when all ranks have.

    Raises ConfigurationError when the environment or the devices do not fit the entry, and
    GroupLost when not all ranks come.
    """
    check_world(model)
    place = torch.device(device)
    check_devices(place)
    if place.type == "cuda":
        use_device(place)
        # NCCL's watchdog may abort a collective that failed or took too long (1, which torchrun
        # sets, and 2). Its kernel then ends like any other: nothing raises where it was called, and
        # whatever is in its output is taken for the result. 0 leaves it alone until `Group` finds
        # that it does not end, and aborts it; so torch advises at `_abort_process_group`.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=JOIN_SECONDS))
        peers = connect()
        _set_timeouts(START_SECONDS, place)
    except (RuntimeError, OSError) as error:
        raise GroupLost(f"the group's ranks did not find each other: {_line(error)}") from error
    group = Group(place, peers)
    log.info("joined group", model=model.name, rank=group.rank, ranks=group.size, device=device)
    return group


class Group:
    """This process's place in a group. `rank` 0 leads."""

    def __init__(self, device: torch.device, peers: Mapping[int, Conn]) -> None:
        self.device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.peers = dict(peers)
        self.seconds = START_SECONDS
        self._orders: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._gone = threading.Event()
        self._ending = self._over = False
        self._reason = ""
        self._callbacks: list[Callable[[str], None]] = []
        self._sending, self._losing = threading.Lock(), threading.Lock()
        self._reader = threading.Thread(target=self._read, name="group", daemon=True)
        self._reader.start()

    @property
    def leads(self) -> bool:
        """Whether this is the rank that claims work."""
        return self.rank == 0

    @property
    def lost(self) -> str | None:
        """Why the group is lost, None while it is well."""
        return self._reason if self._gone.is_set() else None

    def check(self) -> None:
        """Raise GroupLost if the group is lost."""
        if self._gone.is_set():
            raise GroupLost(self._reason)

    def on_lost(self, callback: Callable[[str], None]) -> None:
        """Call back with the reason, once and from any thread, when the group is lost."""
        with self._losing:
            self._callbacks.append(callback)
        if self._gone.is_set():
            callback(self._reason)

    def send(self, kind: str, value: Any = None) -> None:
        """Leader: give all followers an order; tensors in `value` go by one broadcast."""
        parcel = pack(value, self.device)
        with self._sending:
            self.tell(kind, parcel)
            if parcel.data is not None:
                dist.broadcast(parcel.data, src=0)

    def tell(self, kind: str, parcel: Parcel, to: int | None = None) -> None:
        """Leader: send an order without its data, which the caller gets there otherwise.

        Raises GroupLost.
        """
        self.check()
        order = pickle.dumps((kind, parcel.size, parcel.header))
        for rank, peer in self.peers.items():
            if to in (None, rank):
                try:
                    peer.send_bytes(order)
                except OSError as error:
                    self.lose(f"rank {rank} is gone")
                    raise GroupLost(f"rank {rank} is gone") from error

    def hear(self) -> tuple[str, int, bytes]:
        """Follower: the next order's kind, the size of its data, its header. Waits for ever.

        Raises GroupLost when the leader is gone.
        """
        order = self._orders.get()
        if order is None:
            self._orders.put(None)
            raise GroupLost(self._reason)
        kind, size, header = pickle.loads(order)
        return kind, size, header

    def receive(self) -> tuple[str, Any]:
        """Follower: the next order as `send` gave it. Waits for ever; raises GroupLost."""
        kind, size, header = self.hear()
        data = empty(size, self.device)
        if data is not None:
            with self.together():
                dist.broadcast(data, src=0)
        return kind, unpack(Parcel(header, data))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that all ranks do: whatever raises inside ends the group, as GroupLost.

        Also waits for the device, so that a collective that never ends is noticed here.
        """
        self.check()
        try:
            with self._in_time():
                yield
                self._settle()
        except Exception as error:
            if is_collective(error):  # the rank that broke it may be about to say why
                self._gone.wait(GRACE_SECONDS)
            self.lose(f"rank {self.rank} failed: {type(error).__name__}: {_line(error)}")
            raise GroupLost(self._reason) from error

    def lose(self, reason: str) -> None:
        """Give the group up; the first reason counts. Lets the other ranks know by hanging up."""
        with self._losing:
            if self._gone.is_set() or self._ending:
                return
            self._reason = reason
            self._gone.set()
            callbacks = list(self._callbacks)
        log.error("group lost", rank=self.rank, reason=reason)
        if not self.leads:
            for peer in self.peers.values():
                with suppress(OSError):
                    peer.send_bytes(reason.encode())
        self._orders.put(None)
        self._hang_up()
        for callback in callbacks:
            callback(reason)
        if self.device.type == "cuda":
            _abort_collectives()

    def steady(self) -> None:
        """Both sides: from here on every collective ends within GROUP_SECONDS."""
        self.seconds = GROUP_SECONDS
        _set_timeouts(GROUP_SECONDS, self.device)

    def dismiss(self) -> None:
        """Leader: end the followers and leave the group. Harmless when it is lost or over."""
        self._end("stop", None)

    def refuse(self, error: PipelineError | ConfigurationError) -> None:
        """Leader: have every follower raise this error, which all would meet again."""
        self._end("refuse", (type(error), str(error)))

    def _end(self, order: str, value: Any) -> None:
        """Leader: the last order. Who hangs up from now on has heard it."""
        with self._losing:
            self._ending = True
        with suppress(GroupLost):
            self.send(order, value)
        self.leave()

    def leave(self) -> None:
        """Leave the process group, once; nothing may be sent afterwards."""
        with self._losing:
            if self._over:
                return
            self._ending = self._over = True
        if self.leads:  # the followers hang up when they have heard
            self._reader.join(GRACE_SECONDS)
        self._hang_up()
        if self._gone.is_set():
            return  # others may be inside a collective; the process is about to end
        dist.destroy_process_group()

    def _read(self) -> None:
        """Thread: what comes over the sockets, until they close."""
        ranks = {connection: rank for rank, connection in self.peers.items()}
        while ranks:
            for connection in wait(list(ranks)):
                assert isinstance(connection, Conn)
                try:
                    message = connection.recv_bytes()
                except (OSError, EOFError):
                    self._lost_sight(ranks.pop(connection))
                    continue
                if self.leads:
                    self.lose(message.decode())
                else:
                    self._orders.put(message)

    def _lost_sight(self, rank: int) -> None:
        self.lose("the leader is gone" if rank == 0 else f"rank {rank} is gone")

    def _hang_up(self) -> None:
        for connection in self.peers.values():
            with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)

    def wait_for(self, done: Any) -> None:
        """Wait for a CUDA event, as long as the group is well. Raises GroupLost, TimeoutError."""
        ends = time.monotonic() + self.seconds
        while not done.query():
            self.check()
            if time.monotonic() > ends:
                raise TimeoutError(f"{self.device} has not ended after {self.seconds:.0f} seconds")
            time.sleep(POLL_SECONDS)
        self.check()  # a collective that was aborted has ended too

    def _settle(self) -> None:
        """Wait for the device's queue, of the device that is this rank's."""
        if self.device.type == "cuda":
            done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(self.device))
            self.wait_for(done)

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        """Lose the group when this takes too long: on CUDA a forward pass may itself wait for the
        device, and is freed only when the loss aborts the collective that holds it."""
        if self.device.type != "cuda":
            yield
            return
        reason = f"rank {self.rank} has not ended after {self.seconds:.0f} seconds"
        timer = threading.Timer(self.seconds, self.lose, [reason])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def follow(group: Group, handlers: Mapping[str, Handler]) -> None:
    """Follower: carry out the leader's orders until it says stop.

    Raises GroupLost, or the error with which the leader refuses to start.
    """
    while True:
        kind, value = group.receive()
        if kind == "stop":
            group.leave()
            return
        if kind == "refuse":
            group.leave()
            error, sentence = value
            raise error(sentence)
        with group.together():
            handlers[kind](value)


def _set_timeouts(seconds: float, device: torch.device) -> None:
    """Of every process group that this rank is in, the meshes' included."""
    registry: Any = dist.distributed_c10d
    for group in list(registry._world.pg_map):
        registry._set_pg_timeout(timedelta(seconds=seconds), group)
        if device.type == "cuda":
            nccl = group._get_backend(device)
            nccl._set_default_timeout(timedelta(seconds=NCCL_SECONDS))


def _abort_collectives() -> None:
    """End NCCL's collectives, in which a dead rank would keep the device for ever."""
    registry: Any = dist.distributed_c10d
    with suppress(RuntimeError):
        registry._abort_process_group()


def is_collective(error: Exception) -> bool:
    """Whether it is a collective that failed; gloo raises RuntimeErrors with its file names."""
    return isinstance(error, dist.DistError | OSError) or "gloo" in str(error)


def _degrees(model: Model) -> str:
    names = ("ring", "ulysses", "cfg", "tensor", "stages")
    return " x ".join(
        f"{name} {getattr(model, name)}" for name in names if getattr(model, name) > 1
    )


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
