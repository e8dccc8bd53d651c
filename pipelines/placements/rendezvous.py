"""How the ranks of a group get their sockets: one between the leader and each of the others.

The port, and a secret that only ranks of this group can know, go by a broadcast of
torch.distributed, which the ranks have joined by then. Knows what comes over the sockets not.
"""

import hmac
import os
import secrets
import socket
from contextlib import suppress
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

MEET_SECONDS = 30.0
"""How long a socket may be on its way: all ranks are there when the first one asks."""

ONE_MACHINE = ("localhost", "127.0.0.1", "::1")
"""Addresses of the leader at which no other machine could find it."""

Conn = Connection  # the class is generic in some versions of typeshed and not at run time


def connect() -> dict[int, Conn]:
    """A socket between the leader and every other rank, by rank. Raises OSError."""
    rank, size = dist.get_rank(), dist.get_world_size()
    address = os.environ["MASTER_ADDR"]
    if rank == 0:
        with listen(address, size) as server:
            meeting = [server.getsockname()[1], secrets.token_bytes(32)]
            dist.broadcast_object_list(meeting, src=0, device=torch.device("cpu"))
            return accept(server, size - 1, meeting[1])
    meeting = [None, None]
    dist.broadcast_object_list(meeting, src=0, device=torch.device("cpu"))
    line = socket.create_connection((address, meeting[0]), timeout=MEET_SECONDS)
    line.sendall(meeting[1] + rank.to_bytes(4))
    return {0: _connection(line)}


def listen(address: str, backlog: int) -> socket.socket:
    """The leader's end, at any free port.

    On all interfaces, unless the group is on one machine: what the others call the leader need not
    be an address that it has itself. A machine's own name may mean 127.0.1.1 there, and a service's
    address belongs to no machine.
    """
    if address in ONE_MACHINE:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, 0), family=family, backlog=backlog)
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True
        )
    return socket.create_server(("", 0), backlog=backlog)


def accept(server: socket.socket, count: int, secret: bytes) -> dict[int, Conn]:
    """The others' sockets by rank; who does not know the secret is sent away. Raises OSError."""
    peers: dict[int, Conn] = {}
    server.settimeout(MEET_SECONDS)
    while len(peers) < count:
        line, _ = server.accept()
        line.settimeout(MEET_SECONDS)
        greeting = b""
        with suppress(OSError):
            greeting = line.recv(len(secret) + 4, socket.MSG_WAITALL)
        if hmac.compare_digest(greeting[: len(secret)], secret):
            peers[int.from_bytes(greeting[len(secret) :])] = _connection(line)
        else:
            line.close()
    return peers


def _connection(line: socket.socket) -> Conn:
    """Framed, without delay, and closed within seconds when the other machine is gone."""
    line.settimeout(None)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # Linux has them all
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return Connection(line.detach())
