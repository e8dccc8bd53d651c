"""Get files of the Hugging Face hub from the local cache, or download them."""

from collections.abc import Sequence
from pathlib import Path

from jobs.errors import ModelUnavailable, first_line

CONFIGS = ("*.json", "*.txt", "*.model", "*.jinja")
"""Patterns for everything in a diffusers repository except its weights."""


def fetch(repository: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """A folder with the repository's matching files. Raises ModelUnavailable."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client and its HTTP library share no base class
        raise ModelUnavailable(hub_trouble(repository, error), may_pass=True) from error


def fetch_file(path: str, revision: str | None = None) -> Path:
    """One file, given as OWNER/REPOSITORY/PATH. Raises ModelUnavailable."""
    from huggingface_hub import hf_hub_download

    owner, name, file = path.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file, revision=revision))
    except Exception as error:  # as above
        raise ModelUnavailable(hub_trouble(path, error), may_pass=True) from error


def hub_trouble(name: str, error: BaseException) -> str:
    """Why a download failed: the hub refused it, or it can't be reached."""
    from huggingface_hub.errors import HfHubHTTPError

    chain, cause = [error], error.__cause__
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__
    refusal = next((link for link in chain if isinstance(link, HfHubHTTPError)), None)
    if refusal is not None:
        return f"the hub refused the download of {name!r}: {first_line(refusal)}"
    if "safetensors" in str(error):
        return f"{name!r} has no safetensors weights, and pickles aren't loaded"
    return (
        f"{name!r} isn't in the local cache, and the hub can't be reached: {first_line(chain[-1])}"
    )
