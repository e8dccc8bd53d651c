"""A group of ranks, one process each, that form one worker: joining, orders, losing a rank.

Rank 0 leads and is an ordinary worker; the others follow. The leader sends orders to each follower
over a socket, and tensors by collectives of torch.distributed. Sockets have two advantages over
collectives. Without work, ranks wait on a socket and not in a collective, so idle time never counts
as a timeout. And a rank that dies closes its sockets, which the connected ranks notice at once. The
leader is connected to all; followers are connected only to the leader and end with it.

If anything raises within a forward pass, the group can't be used any more, because other ranks may
be inside a collective. All processes then end and are restarted. Has no code for particular models.
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
from jobs.errors import ConfigurationError, GroupLost, PipelineError, first_line
from pipelines.device import use_device
from pipelines.placements.rendezvous import Conn, connect
from pipelines.placements.tensor_pickle import Payload, empty, pack, unpack

GROUP_SECONDS = 60.0
"""How late a rank may be for a collective once the group serves (see `Group.steady`)."""

START_SECONDS = 1800.0
"""The same while the group starts, because ranks load weights at different speeds."""

JOIN_SECONDS = 300.0
"""How long the ranks may take to find each other."""

NCCL_SECONDS = 2 * START_SECONDS
"""NCCL's own timeout, long enough that ours always ends first."""

GRACE_SECONDS = 3.0
"""How long to wait for another rank's reason after a collective failed."""

POLL_SECONDS = 0.0002
"""How often to check whether a device has finished."""

Handler = Callable[[Any], None]

log = structlog.get_logger(__name__)


def rank_of_environment() -> int:
    """RANK as set by a launcher; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def check_world(model: Model) -> None:
    """Raise ConfigurationError unless the environment has exactly the model's ranks."""
    missing = [
        n for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ
    ]
    if missing:
        raise ConfigurationError(
            f"placement {model.placement!r} takes {model.ranks} processes; start them with the "
            f"supervisor or torchrun (not set: {', '.join(missing)})"
        )
    world = int(os.environ["WORLD_SIZE"])
    if world != model.ranks:
        raise ConfigurationError(
            f"placement {model.placement!r} takes {model.ranks} processes "
            f"({_degrees(model)}), but WORLD_SIZE is {world}"
        )


def check_devices(device: torch.device) -> None:
    """Raise ConfigurationError if this rank's device doesn't exist."""
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"rank {rank_of_environment()}: {device} not found, "
            f"there are only {torch.cuda.device_count()} CUDA devices"
        )


def join(model: Model, device: str) -> "Group":
    """Join the group that the environment describes; returns when all ranks have joined.

    Raises ConfigurationError if the environment or the devices don't match the entry, and GroupLost
    if not all ranks join.
    """
    check_world(model)
    place = torch.device(device)
    check_devices(place)
    if place.type == "cuda":
        use_device(place)
        # With 1 (as torchrun sets it) or 2, NCCL's watchdog may abort a collective that failed or
        # took too long. Its kernel then ends normally: the call doesn't raise, and whatever is in
        # the output passes for the result. With 0 the collective hangs until `Group` notices and
        # aborts it, as torch recommends at `_abort_process_group`.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=JOIN_SECONDS))
        peers = connect()
        _set_timeouts(START_SECONDS, place)
    except (RuntimeError, OSError) as error:
        raise GroupLost(f"the group's ranks didn't find each other: {first_line(error)}") from error
    group = Group(place, peers)
    log.info("joined group", model=model.name, rank=group.rank, ranks=group.size, device=device)
    return group


class Group:
    """This process's membership in a group. Rank 0 leads."""

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
        """Whether this rank claims work."""
        return self.rank == 0

    @property
    def lost(self) -> str | None:
        """Why the group is lost; None while it isn't."""
        return self._reason if self._gone.is_set() else None

    def check(self) -> None:
        """Raise GroupLost if the group is lost."""
        if self._gone.is_set():
            raise GroupLost(self._reason)

    def on_lost(self, callback: Callable[[str], None]) -> None:
        """Call `callback` with the reason when the group is lost: once, from any thread."""
        with self._losing:
            self._callbacks.append(callback)
        if self._gone.is_set():
            callback(self._reason)

    def send(self, kind: str, value: Any = None) -> None:
        """Leader: send an order to all followers; the tensors in `value` go in one broadcast."""
        payload = pack(value, self.device)
        with self._sending:
            self.announce(kind, payload)
            if payload.data is not None:
                dist.broadcast(payload.data, src=0)

    def announce(self, kind: str, payload: Payload, to: int | None = None) -> None:
        """Leader: send an order without its data, which the caller sends separately.

        Raises GroupLost.
        """
        self.check()
        order = pickle.dumps((kind, payload.size, payload.header))
        for rank, peer in self.peers.items():
            if to in (None, rank):
                try:
                    peer.send_bytes(order)
                except OSError as error:
                    self.lose(f"rank {rank} is gone")
                    raise GroupLost(f"rank {rank} is gone") from error

    def next_order(self) -> tuple[str, int, bytes]:
        """Follower: the next order's kind, the size of its data, and its header. Waits forever.

        Raises GroupLost if the leader is gone.
        """
        order = self._orders.get()
        if order is None:
            self._orders.put(None)  # for later calls
            raise GroupLost(self._reason)
        kind, size, header = pickle.loads(order)
        return kind, size, header

    def receive(self) -> tuple[str, Any]:
        """Follower: the next order, as passed to `send`. Waits forever; raises GroupLost."""
        kind, size, header = self.next_order()
        data = empty(size, self.device)
        if data is not None:
            with self.together():
                dist.broadcast(data, src=0)
        return kind, unpack(Payload(header, data))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context for work shared by all ranks: any exception inside ends the group, as GroupLost.

        Also waits for the device, so that a collective that never ends is noticed here.
        """
        self.check()
        try:
            with self._in_time():
                yield
                self._settle()
        except Exception as error:
            if is_collective_error(error):  # the rank at fault may still report why
                self._gone.wait(GRACE_SECONDS)
            self.lose(f"rank {self.rank} failed: {type(error).__name__}: {first_line(error)}")
            raise GroupLost(self._reason) from error

    def lose(self, reason: str) -> None:
        """Mark the group as lost and close the sockets, so other ranks notice.

        Only the first reason counts.
        """
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
        """All ranks: from now on every collective must end within GROUP_SECONDS."""
        self.seconds = GROUP_SECONDS
        _set_timeouts(GROUP_SECONDS, self.device)

    def dismiss(self) -> None:
        """Leader: end the followers and leave the group. Does nothing if it's lost or over."""
        self._end("stop", None)

    def refuse(self, error: PipelineError | ConfigurationError) -> None:
        """Leader: make every follower raise this error, which a restart wouldn't fix."""
        self._end("refuse", (type(error), str(error)))

    def _end(self, order: str, value: Any) -> None:
        """Leader: send the last order. Sockets that close from now on don't mean a loss."""
        with self._losing:
            self._ending = True
        with suppress(GroupLost):
            self.send(order, value)
        self.leave()

    def leave(self) -> None:
        """Leave the process group; nothing may be sent afterwards. Does nothing the second time."""
        with self._losing:
            if self._over:
                return
            self._ending = self._over = True
        if self.leads:  # until the followers have closed their sockets
            self._reader.join(GRACE_SECONDS)
        self._hang_up()
        if self._gone.is_set():
            return  # others may be inside a collective; the process is about to end
        dist.destroy_process_group()

    def _read(self) -> None:
        """Thread: read the sockets until they close. Followers get orders, the leader reasons."""
        ranks = {connection: rank for rank, connection in self.peers.items()}
        while ranks:
            for connection in wait(list(ranks)):
                assert isinstance(connection, Conn)
                try:
                    message = connection.recv_bytes()
                except (OSError, EOFError):
                    self._on_hangup(ranks.pop(connection))
                    continue
                if self.leads:
                    self.lose(message.decode())
                else:
                    self._orders.put(message)

    def _on_hangup(self, rank: int) -> None:
        self.lose("the leader is gone" if rank == 0 else f"rank {rank} is gone")

    def _hang_up(self) -> None:
        for connection in self.peers.values():
            with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)

    def wait_for(self, done: Any) -> None:
        """Wait for a CUDA event unless the group is lost. Raises GroupLost, TimeoutError."""
        ends = time.monotonic() + self.seconds
        while not done.query():
            self.check()
            if time.monotonic() > ends:
                seconds = f"{self.seconds:.0f} seconds"
                raise TimeoutError(f"{self.device} hasn't finished after {seconds}")
            time.sleep(POLL_SECONDS)
        self.check()  # an aborted collective ends too, with a wrong result

    def _settle(self) -> None:
        """Wait until this rank's device has finished its queue."""
        if self.device.type == "cuda":
            done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(self.device))
            self.wait_for(done)

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        """Lose the group if the body takes too long.

        On CUDA a forward pass may itself wait for the device. If a collective hangs there, the wait
        ends only when the loss aborts that collective.
        """
        if self.device.type != "cuda":
            yield
            return
        reason = f"rank {self.rank} hasn't finished after {self.seconds:.0f} seconds"
        timer = threading.Timer(self.seconds, self.lose, [reason])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def follow(group: Group, handlers: Mapping[str, Handler]) -> None:
    """Follower: carry out the leader's orders until it says stop.

    Raises GroupLost, or the leader's refusal.
    """
    while True:
        kind, value = group.receive()
        if kind == "stop":
            group.leave()
            return
        if kind == "refuse":
            group.leave()
            error, message = value
            raise error(message)
        with group.together():
            handlers[kind](value)


def _set_timeouts(seconds: float, device: torch.device) -> None:
    """Set the timeout of every process group of this rank, including those of meshes."""
    registry: Any = dist.distributed_c10d
    for group in list(registry._world.pg_map):
        registry._set_pg_timeout(timedelta(seconds=seconds), group)
        if device.type == "cuda":
            nccl = group._get_backend(device)
            nccl._set_default_timeout(timedelta(seconds=NCCL_SECONDS))


def _abort_collectives() -> None:
    """End NCCL's collectives, where a dead rank would block the device forever."""
    registry: Any = dist.distributed_c10d
    with suppress(RuntimeError):
        registry._abort_process_group()


def is_collective_error(error: Exception) -> bool:
    """Whether a collective failed. gloo raises RuntimeErrors that contain its file names."""
    return isinstance(error, dist.DistError | OSError) or "gloo" in str(error)


def _degrees(model: Model) -> str:
    names = ("ring", "ulysses", "cfg", "tensor", "stages")
    return " x ".join(
        f"{name} {getattr(model, name)}" for name in names if getattr(model, name) > 1
    )
