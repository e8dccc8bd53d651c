"""The service's own settings, on top of those that every process shares.

Read once in `__main__` and passed inward. Knows nothing of what the values are used for.
"""

import ipaddress

from pydantic import Field, SecretStr, field_validator
from standardwebhooks import Webhook

from jobs.settings import QueueSettings


class ServiceSettings(QueueSettings):
    """`IMAGEMILL_*` variables of the HTTP service. Sizes are bytes, times seconds.

    `anonymous` lets callers from other machines in without keys, where there are none.
    `public_url` is how callers reach the service, without a trailing slash; when it is unset,
    URLs in answers are paths. `sync_seconds` is how long a request may wait on the line for its
    images, on the routes that answer with them.
    `webhook_secret` signs webhooks (`whsec_` and base64); unset, one is made and kept in the data
    folder. `webhook_private` allows webhooks to addresses that are not public; unset, exactly
    while only this machine can reach the service.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    anonymous: bool = False
    public_url: str | None = Field(default=None, pattern=r"^https?://[^\s?#]*[^\s?#/]$")
    max_body_bytes: int = Field(default=16 * 2**20, ge=1)
    max_file_bytes: int = Field(default=200 * 2**20, ge=1)
    sync_seconds: float = Field(default=600, gt=0)
    webhook_secret: SecretStr | None = None
    webhook_private: bool | None = None

    @field_validator("webhook_secret")
    @classmethod
    def _can_sign(cls, value: SecretStr | None) -> SecretStr | None:
        try:
            if value is not None:
                Webhook(value.get_secret_value())
        except Exception as error:  # the library has no error of its own for each kind
            raise ValueError("must be whsec_ followed by base64") from error
        return value

    @property
    def allows_private_webhooks(self) -> bool:
        """Whether a webhook may go to an address that is not public."""
        return self.loopback if self.webhook_private is None else self.webhook_private

    @property
    def may_be_open(self) -> bool:
        """Whether callers may come without a key, where there are none."""
        return self.loopback or self.anonymous

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
