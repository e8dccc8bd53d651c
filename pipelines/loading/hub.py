"""Files of the Hugging Face hub: from the local cache, or fetched when the hub can be reached."""

from collections.abc import Sequence
from pathlib import Path

from jobs.errors import ModelUnavailable
from pipelines.loading.headers import first_line

CONFIGS = ("*.json", "*.txt", "*.model", "*.jinja")
"""Patterns of everything in a diffusers repository but its weights."""


def fetch(repository: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """A folder with the repository's files that match. Raises ModelUnavailable."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client and its HTTP library have theirs
        raise ModelUnavailable(hub_trouble(repository, error), may_pass=True) from error


def fetch_file(path: str, revision: str | None = None) -> Path:
    """One file, named as OWNER/REPOSITORY/PATH. Raises ModelUnavailable."""
    from huggingface_hub import hf_hub_download

    owner, name, file = path.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file, revision=revision))
    except Exception as error:  # as above
        raise ModelUnavailable(hub_trouble(path, error), may_pass=True) from error


def hub_trouble(name: str, error: BaseException) -> str:
    """Why the hub gave nothing: it refused, or it can't be reached."""
    from huggingface_hub.errors import HfHubHTTPError

    links, link = [error], error.__cause__
    while link is not None:
        links.append(link)
        link = link.__cause__
    answer = next((each for each in links if isinstance(each, HfHubHTTPError)), None)
    if answer is not None:
        return f"the hub does not hand out {name!r}: {first_line(answer)}"
    if "safetensors" in str(error):
        return f"{name!r} has no safetensors weights, and pickles aren't loaded"
    return (
        f"{name!r} is not in the local cache and the hub cannot be reached: {first_line(links[-1])}"
    )
