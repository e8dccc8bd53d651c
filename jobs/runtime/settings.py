"""The settings that every imagemill process shares: where the queue and the data are, and limits.

Read once in a process's `main`, then passed inward as plain values. `service/settings.py` and
`workers/settings.py` add their own fields to it. Knows nothing of what the values are used for.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from jobs.errors import ConfigurationError

MOST_SECONDS = 10**9
"""Longest time that a setting may say: thirty years, which every clock and timer still takes."""


class QueueSettings(BaseSettings):
    """Values from `IMAGEMILL_*` variables, frozen. Times are seconds.

    `redis_url` unset means the embedded server in `data`, run from `redis_server` when that is
    given. `max_unfinished` is the quota: images of one tenant that are queued or running.
    `keep_seconds` is how long a job and its files outlive its end. `log` is the form of log lines.
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
        """Where a worker leaves the model's tokenizer for the service to count prompts by."""
        return self.data / "tokenizers" / f"{model}.json"

    @classmethod
    def read(cls, **given: Any) -> Self:
        """The environment's values, overridden by `given` (flags). Raises ConfigurationError."""
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            name = "IMAGEMILL_" + "_".join(str(part) for part in first["loc"]).upper()
            raise ConfigurationError(f"{name}: {first['msg']}") from error

    def make_folder(self) -> None:
        """Make the data folder, if there is none. Raises ConfigurationError."""
        try:
            self.data.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"IMAGEMILL_DATA: no folder can be made: {error}") from error
