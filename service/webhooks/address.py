"""Where a webhook may go: never into the private network of the service, unless that is allowed.

A name is resolved here and the request is sent to the very address that was checked, so that a
name which changes its answer in between leads nowhere else. Knows no message.
"""

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Refused(Exception):
    """The address is not one that a webhook may go to."""


@dataclass(frozen=True, slots=True)
class Target:
    """A checked address: connect to `url`, naming `host` (in the Host header and to TLS)."""

    url: str
    host: str
    server_name: str


def target_of(url: str, *, private: bool) -> Target:
    """The address to connect to for `url`. Raises Refused, or OSError for a name without one."""
    parts = urlsplit(url)
    name = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    addresses = [str(one[4][0]) for one in found]
    if not private:
        for address in addresses:
            if not is_public(address):
                raise Refused(f"{name} is at {address}, which is not a public address")
    address = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    host = parts.netloc.rpartition("@")[2]
    return Target(f"{parts.scheme}://{address}:{port}{path}", host, name)


def is_literal_and_private(url: str) -> bool:
    """Whether `url` names a private address outright, without any name to resolve."""
    name = urlsplit(url).hostname or ""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return not is_public(name)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, also where IPv6 wraps an IPv4 one."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found in _NAT64:
            return False
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo and found.teredo[1])
        if inner:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast
