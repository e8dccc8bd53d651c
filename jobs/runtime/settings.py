"""The settings that all imagemill processes share: where the queue and the data are, and limits.

They're read once, in a process's `main`, and passed inward as plain values. `service/settings.py`
and `workers/settings.py` add their own fields.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from jobs.catalog import BUILT_IN
from jobs.errors import ConfigurationError

MOST_SECONDS = 10**9
"""Largest value of any time setting: thirty years, which every clock and timer can handle."""


class QueueSettings(BaseSettings):
    """Values from `IMAGEMILL_*` variables, frozen. Times are in seconds.

    Without `redis_url`, the embedded server in `data` is used, run from `redis_server` if that's
    set. `max_unfinished` is the quota: how many images of one tenant may be queued or running.
    `keep_seconds` is how long a job and its files are kept after it ends. `log` is the log format.
    """

    model_config = SettingsConfigDict(
        env_prefix="IMAGEMILL_", env_ignore_empty=True, frozen=True, allow_inf_nan=False
    )

    data: Path = Path("data")
    redis_url: str | None = None
    redis_server: Path | None = None
    models: Path = Path("models.toml")
    pool: str = Field(default="default", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    max_unfinished: int = Field(default=100_000, ge=1)
    keep_seconds: int = Field(default=7 * 86400, ge=1, le=MOST_SECONDS)
    lease_seconds: float = Field(default=15, gt=0, le=MOST_SECONDS)
    max_attempts: int = Field(default=3, ge=1)
    max_stalls: int = Field(default=3, ge=0)
    log: Literal["console", "json"] = "console"

    def tokenizer_file(self, model: str) -> Path:
        """Where a worker stores the model's tokenizer, which the service counts prompts with."""
        return self.data / "tokenizers" / f"{model}.json"

    @classmethod
    def read(cls, **flags: Any) -> Self:
        """The environment's values, overridden by `flags`. Raises ConfigurationError.

        If nothing names a catalog and there is no `models.toml` here, it's the built-in one.
        """
        try:
            settings = cls(**flags)
        except ValidationError as error:
            first = error.errors()[0]
            name = "IMAGEMILL_" + "_".join(str(part) for part in first["loc"]).upper()
            raise ConfigurationError(f"{name}: {first['msg']}") from error
        if "models" in settings.model_fields_set or settings.models.exists():
            return settings
        return settings.model_copy(update={"models": BUILT_IN})

    def make_folder(self) -> None:
        """Create the data folder if it's missing. Raises ConfigurationError."""
        try:
            self.data.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"IMAGEMILL_DATA: cannot create the folder: {error}"
            ) from error
