"""Sockets between a group's ranks: one between the leader and each follower.

The port, and a secret that only this group's ranks know, are broadcast over torch.distributed,
which the ranks have joined by then. Doesn't interpret what is sent over the sockets.
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
"""How long a socket may take to connect. Short, because all ranks are running by then."""

ONE_MACHINE = ("localhost", "127.0.0.1", "::1")
"""Leader addresses that no other machine can reach."""

Conn = Connection  # generic in some versions of typeshed, but not at run time


def connect() -> dict[int, Conn]:
    """A socket between the leader and every other rank, by rank. Raises OSError."""
    rank, size = dist.get_rank(), dist.get_world_size()
    address = os.environ["MASTER_ADDR"]
    if rank == 0:
        with listen(address, size) as server:
            shared = [server.getsockname()[1], secrets.token_bytes(32)]
            dist.broadcast_object_list(shared, src=0, device=torch.device("cpu"))
            return accept(server, size - 1, shared[1])
    shared = [None, None]
    dist.broadcast_object_list(shared, src=0, device=torch.device("cpu"))
    port, secret = shared
    client = socket.create_connection((address, port), timeout=MEET_SECONDS)
    client.sendall(secret + rank.to_bytes(4))
    return {0: _connection(client)}


def listen(address: str, backlog: int) -> socket.socket:
    """The leader's listening socket, on any free port.

    Listens on all interfaces unless the group is on one machine, because the address that the
    others use needn't be one of the leader's own: a machine's name may resolve to 127.0.1.1 on that
    machine, and a Kubernetes service's address belongs to no machine.
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
    """The followers' sockets by rank. Closes connections without the secret. Raises OSError."""
    peers: dict[int, Conn] = {}
    server.settimeout(MEET_SECONDS)
    while len(peers) < count:
        client, _ = server.accept()
        client.settimeout(MEET_SECONDS)
        greeting = b""
        with suppress(OSError):
            greeting = client.recv(len(secret) + 4, socket.MSG_WAITALL)
        if hmac.compare_digest(greeting[: len(secret)], secret):
            peers[int.from_bytes(greeting[len(secret) :])] = _connection(client)
        else:
            client.close()
    return peers


def _connection(client: socket.socket) -> Conn:
    """A framed connection without Nagle's delay that notices a lost machine within seconds."""
    client.settimeout(None)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # Linux has all three
            client.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return Connection(client.detach())
