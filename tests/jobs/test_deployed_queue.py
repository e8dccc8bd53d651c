"""The queue server of docker/kubernetes: its settings must not lose jobs."""

from pathlib import Path

import yaml

QUEUE = Path(__file__).parents[2] / "docker" / "kubernetes" / "queue.yaml"
UNITS = {"gb": 2**30, "mb": 2**20, "Gi": 2**30, "Mi": 2**20}


def size(text: str) -> int:
    return int(text[:-2]) * UNITS[text[-2:]]


def test_it_refuses_writes_before_the_kernel_kills_it() -> None:
    """Under heavy writing, rewriting the log may need as much memory again as the data."""
    objects = yaml.safe_load_all(QUEUE.read_text())
    [server] = [item for item in objects if item["kind"] != "Service"]
    [container] = server["spec"]["template"]["spec"]["containers"]
    words = container["args"]
    options = {name: words[i + 1] for i, name in enumerate(words) if name.startswith("--")}
    assert options["--maxmemory-policy"] == "noeviction"
    assert 0 < 2 * size(options["--maxmemory"]) <= size(container["resources"]["limits"]["memory"])
