"""The service's own settings, on top of those that every process shares.

Read once in `__main__` and passed inward. Knows nothing of what the values are used for.
"""

import ipaddress

from pydantic import Field

from jobs.settings import QueueSettings


class ServiceSettings(QueueSettings):
    """`IMAGEMILL_*` variables of the HTTP service. Sizes are bytes.

    `public_url` is how callers reach the service, without a trailing slash; when it is unset,
    URLs in answers are paths.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    public_url: str | None = Field(default=None, pattern=r"^https?://[^\s?#]*[^\s?#/]$")
    max_body_bytes: int = Field(default=16 * 2**20, ge=1)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
