"""The queue server of docker/kubernetes: its settings are such that it loses no job."""

from pathlib import Path

import yaml

QUEUE = Path(__file__).parents[2] / "docker" / "kubernetes" / "queue.yaml"
UNITS = {"gb": 2**30, "mb": 2**20, "Gi": 2**30, "Mi": 2**20}


def size(text: str) -> int:
    return int(text[:-2]) * UNITS[text[-2:]]


def test_it_refuses_writes_before_the_kernel_kills_it() -> None:
    """Rewriting its log may take as much memory again as the data, under heavy writing."""
    [server] = [one for one in yaml.safe_load_all(QUEUE.read_text()) if one["kind"] != "Service"]
    [container] = server["spec"]["template"]["spec"]["containers"]
    words = container["args"]
    given = {name: words[place + 1] for place, name in enumerate(words) if name.startswith("--")}
    assert given["--maxmemory-policy"] == "noeviction"
    assert 0 < 2 * size(given["--maxmemory"]) <= size(container["resources"]["limits"]["memory"])
