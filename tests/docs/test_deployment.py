"""Checks docker/ without a container engine: its files parse, and the names in them exist."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from imagemill.cli import app as imagemill
from jobs.catalog import load_catalog
from tests.docs.pages import DOCKER, ROOT
from workers.process.supervisor import GRACE_SECONDS
from workers.settings import WorkerSettings

HERE = ROOT / "docker"
COMPOSE = yaml.safe_load((HERE / "compose.yaml").read_text())
DOCKERFILE = (HERE / "Dockerfile").read_text()
ALERTS = yaml.safe_load((HERE / "alerts.yml").read_text())
DASHBOARD = json.loads((HERE / "grafana" / "dashboard.json").read_text())
DOCUMENTS = [
    document
    for path in sorted((HERE / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]
COMMANDS = typer.main.get_command(imagemill).commands
LABELS = {"model", "priority", "state", "method", "route", "status", "le", "instance", "job"}
LABELS |= {"worker", "result", "kind", "outcome"}


def kubernetes(kind: str) -> dict[str, Any]:
    """The objects of a kind, by name."""
    return {item["metadata"]["name"]: item for item in DOCUMENTS if item["kind"] == kind}


def pods() -> list[dict[str, Any]]:
    """The pod specs that run imagemill."""
    return [item["spec"]["template"]["spec"] for item in kubernetes("Deployment").values()]


def expressions() -> Iterator[str]:
    """Every Prometheus expression."""
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for group in ALERTS["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def test_every_file_is_checked():
    parsed = {".yaml", ".yml", ".json"}
    others = {path.name for path in DOCKER if path.suffix not in parsed}
    assert others == {"Dockerfile", "Dockerfile.dockerignore"}
    for path in DOCKER:
        if path.suffix in parsed - {".json"}:
            assert list(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("expression", list(expressions()))
def test_metrics_and_labels_of_an_expression_exist(expression, metrics):
    named = set(re.findall(r"\b(imagemill_\w+)", expression))
    assert named <= metrics and (named or "up{" in expression)
    grouped = re.findall(r"\b(?:by|on) \(([^)]*)\)", expression)
    matched = re.findall(r"[{,] ?(\w+)=", expression)
    assert {label.strip() for group in grouped for label in group.split(",")} | set(
        matched
    ) <= LABELS
    assert expression.count("(") == expression.count(")")


def test_all_metrics_are_shown(metrics):
    shown = " ".join(t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"])
    assert not {name for name in metrics if name not in shown}


def test_routes_in_expressions_exist(routes):
    named = {
        match
        for expression in expressions()
        for match in re.findall(r'method="(\w+)", route="([^"]+)"', expression)
    }
    assert named and {f"{method} {route}" for method, route in named} <= routes


def test_panels_do_not_overlap():
    occupied = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & occupied and max(x for x, _ in cells) < 24
        occupied |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_dockerfile_copies_every_package():
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for word in line.split()[:-1]
    }
    assert all((ROOT / name).exists() for name in copied)
    packages = re.search(r"^include = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert packages is not None
    assert {name.rstrip("*") for name in re.findall(r'"([^"]+)"', packages[1])} <= copied
    ignored = (HERE / "Dockerfile.dockerignore").read_text().split()
    assert copied == {name.removeprefix("!") for name in ignored if name.startswith("!")}


def test_the_image_runs_unprivileged_and_its_commands_exist():
    assert re.search(r"^USER imagemill$", DOCKERFILE, re.MULTILINE)
    [entry] = re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.MULTILINE)
    assert json.loads(entry) == ["imagemill"]
    words = [json.loads(line) for line in re.findall(r"^CMD (.+)$", DOCKERFILE, re.MULTILINE)]
    words += [COMPOSE["services"][name]["command"] for name in ("service", "workers")]
    words += [pod["containers"][0]["args"] for pod in pods()]
    assert {arguments[0] for arguments in words} <= set(COMMANDS)
    for module in re.findall(r'"-m", "([\w.]+)"', DOCKERFILE):
        assert importlib.util.find_spec(module)


def test_commands_in_comments_exist():
    for path in DOCKER:
        text = path.read_text()
        named = re.findall(r"(?:-- imagemill|run --rm service) (\w+) (\w+)", text)
        for command, verb in named:
            assert verb in COMMANDS[command].commands


def test_compose_refers_only_to_declared_names():
    services = COMPOSE["services"]
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            there = (HERE / source).exists() if source.startswith(".") else None
            assert there or source in COMPOSE["volumes"]
    shared = [services[name]["volumes"] for name in ("service", "workers")]
    assert shared[0] == shared[1] == ["data:/data"]
    for name in ("service", "workers"):
        url = services[name]["environment"]["IMAGEMILL_REDIS_URL"]
        assert re.match(r"redis://(\w+):", url)[1] in services
    assert "appendonly" in " ".join(services["valkey"]["command"])


def test_prometheus_scrapes_the_service_and_reads_the_alerts():
    configuration = yaml.safe_load((HERE / "prometheus.yml").read_text())
    assert all((HERE / name).exists() for name in configuration["rule_files"])
    [job] = configuration["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert COMPOSE["services"][name]["environment"]["IMAGEMILL_PORT"] == port


def test_grace_periods_outlast_the_drain():
    workers = COMPOSE["services"]["workers"]
    drain = float(workers["environment"]["IMAGEMILL_DRAIN_SECONDS"])
    assert seconds(workers["stop_grace_period"]) >= drain + GRACE_SECONDS
    variables = kubernetes("ConfigMap")["imagemill-settings"]["data"]
    drain = float(variables["IMAGEMILL_DRAIN_SECONDS"])
    assert drain == WorkerSettings.model_fields["drain_seconds"].default
    pod = kubernetes("Deployment")["imagemill-workers"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= drain + GRACE_SECONDS


def test_pods_refer_only_to_declared_names(routes):
    for pod in pods():
        assert pod["enableServiceLinks"] is False
        declared = {volume["name"] for volume in pod["volumes"]}
        for volume in pod["volumes"]:
            if "configMap" in volume:
                assert volume["configMap"]["name"] in kubernetes("ConfigMap")
            else:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert claim in kubernetes("PersistentVolumeClaim")
        [container] = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == declared
        for source in container["envFrom"]:
            assert source["configMapRef"]["name"] in kubernetes("ConfigMap")
        ports = {port["name"] for port in container.get("ports", [])}
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            if name in container:
                probe = container[name]["httpGet"]
                assert f"GET {probe['path']}" in routes and probe["port"] in ports


def test_selectors_find_their_pods():
    for item in [*kubernetes("Deployment").values(), *kubernetes("StatefulSet").values()]:
        labels = item["spec"]["template"]["metadata"]["labels"]
        assert item["spec"]["selector"]["matchLabels"] == labels
    pod_labels = [
        item["spec"]["template"]["metadata"]["labels"]
        for kind in ("Deployment", "StatefulSet")
        for item in kubernetes(kind).values()
    ]
    for service in kubernetes("Service").values():
        assert service["spec"]["selector"] in pod_labels


def test_the_cluster_catalog_is_valid(tmp_path):
    maps = kubernetes("ConfigMap")
    text = maps["imagemill-models"]["data"]["models.toml"]
    (tmp_path / "models.toml").write_text(text)
    for model in load_catalog(tmp_path / "models.toml"):
        assert model.local
        inside = Path(model.path).relative_to("/app")
        assert (ROOT / inside / "model_index.json").exists()
    where = Path(maps["imagemill-settings"]["data"]["IMAGEMILL_MODELS"])
    for pod in pods():
        mounts = {
            mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]
        }
        assert mounts["models"] == str(where.parent)
