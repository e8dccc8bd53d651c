"""Checks webhook addresses: none in the service's private network, unless that's allowed.

The host name is resolved here and the request is sent to exactly the address that was checked, so a
DNS record that changes in between has no effect. Doesn't know about messages.
"""

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Refused(Exception):
    """Webhooks may not be sent to this address."""


@dataclass(frozen=True, slots=True)
class Target:
    """A checked address: connect to `url` with Host header `host` and TLS name `server_name`."""

    url: str
    host: str
    server_name: str


def target_of(url: str, *, private: bool) -> Target:
    """The address to connect to for `url`. Raises Refused, or OSError if it can't be resolved."""
    parts = urlsplit(url)
    name = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    infos = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    addresses = [str(info[4][0]) for info in infos]
    if not private:
        for address in addresses:
            if not is_public(address):
                raise Refused(f"{name} resolves to {address}, which is not a public address")
    address = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    host = parts.netloc.rpartition("@")[2]
    return Target(f"{parts.scheme}://{address}:{port}{path}", host, name)


def is_literal_and_private(url: str) -> bool:
    """Whether the host of `url` is a private IP address or localhost, so no resolving is needed."""
    name = urlsplit(url).hostname or ""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return not is_public(name)


def is_public(address: str) -> bool:
    """Whether an IP address is public; an IPv4 address embedded in an IPv6 one is checked too."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            return False
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if inner:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast
