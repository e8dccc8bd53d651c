"""The service's own settings, in addition to those shared by all processes.

Read once in `__main__` and passed inward. Doesn't know what the values are used for.
"""

import ipaddress
from typing import Annotated

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode
from standardwebhooks import Webhook

from jobs.runtime.settings import QueueSettings

_Origin = Annotated[str, Field(pattern=r"^(\*|https?://[^\s/?#,*]+)$")]


class ServiceSettings(QueueSettings):
    """`IMAGEMILL_*` variables of the HTTP service. Sizes are in bytes, times in seconds.

    - `anonymous`: allow callers from other machines without a key, if there are no keys
    - `public_url`: the URL at which callers reach the service, without a trailing slash; if unset,
      URLs in responses are paths
    - `sync_seconds`: how long a request may wait for its images, on routes that respond with them
    - `absent_seconds`: how long a model may be without a worker before its callers get a warning
    - `webhook_secret`: signs webhooks (`whsec_` and base64); if unset, one is generated and stored
      in the data folder
    - `webhook_private`: allow webhooks to private addresses; if unset, they're only allowed while
      only this machine can reach the service and there are no API keys
    - `url_secret`: signs the URLs of results; if unset, one is generated and stored in the data
      folder
    - `url_seconds`: how long a signed URL is valid, at least; 0: URLs aren't signed
    - `cors_origins`: the sites whose pages may call the service from a browser
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    anonymous: bool = False
    public_url: str | None = Field(default=None, pattern=r"^https?://[^\s?#]*[^\s?#/]$")
    max_body_bytes: int = Field(default=16 * 2**20, ge=1)
    max_file_bytes: int = Field(default=200 * 2**20, ge=1)
    sync_seconds: float = Field(default=600, gt=0)
    absent_seconds: float = Field(default=30, ge=0)
    webhook_secret: SecretStr | None = None
    webhook_private: bool | None = None
    url_secret: Annotated[SecretStr, Field(min_length=32)] | None = None
    url_seconds: int = Field(default=86_400, ge=0)
    cors_origins: Annotated[tuple[_Origin, ...] | None, NoDecode] = None

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(origin.strip() for origin in value.split(",") if origin.strip())
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _can_sign(cls, value: SecretStr | None) -> SecretStr | None:
        try:
            if value is not None:
                Webhook(value.get_secret_value())
        except Exception as error:  # the library doesn't document which errors it raises
            raise ValueError("must be whsec_ followed by base64") from error
        return value

    @property
    def may_be_open(self) -> bool:
        """Whether callers need no key as long as there are no keys."""
        return self.loopback or self.anonymous

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a host name or IP address is this machine's loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
