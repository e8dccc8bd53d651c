"""Which devices workers get, given the driver's list and CUDA_VISIBLE_DEVICES."""

import os
from pathlib import Path

import pytest

from jobs.errors import ConfigurationError
from workers.process import devices
from workers.process.devices import Gpu, listed_gpus, seated, visible_devices, why_none

PLAIN = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa1111-0000-0000-0000-000000000000)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa2222-0000-0000-0000-000000000000)
GPU 2: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb3333-0000-0000-0000-000000000000)
"""
CUT = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-cccc1111-0000-0000-0000-000000000000)
  MIG 3g.20gb     Device  0: (UUID: MIG-dddd1111-0000-0000-0000-000000000000)
  MIG 3g.20gb     Device  1: (UUID: MIG-dddd2222-0000-0000-0000-000000000000)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-cccc2222-0000-0000-0000-000000000000)
"""
REST = "-0000-0000-0000-000000000000"
FIRST, SECOND = f"MIG-dddd1111{REST}", f"MIG-dddd2222{REST}"
WHOLE = f"GPU-cccc2222{REST}"


def test_driver_list_is_parsed() -> None:
    assert [gpu.uuid[:12] for gpu in listed_gpus(PLAIN)] == [
        "GPU-aaaa1111",
        "GPU-aaaa2222",
        "GPU-bbbb3333",
    ]
    assert listed_gpus(CUT) == [Gpu(f"GPU-cccc1111{REST}", (FIRST, SECOND)), Gpu(WHOLE)]
    assert listed_gpus("No devices found.\n") == []


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (None, 3),
        ("0", 1),
        ("2,0", 2),
        (" 1 , 2 ", 2),
        ("+1", 1),
        ("", 0),
        ("  ", 0),
        ("-1", 0),
        ("NoDevFiles", 0),
        ("0,-1,1", 1),
        ("0,-1,0", 1),
        ("GPU-aaaa1", 1),
        (f"GPU-bbbb3333{REST},GPU-aaaa1111", 2),
    ],
)
def test_variable_is_read_as_cuda_does(value: str | None, count: int) -> None:
    names = visible_devices(value, listed_gpus(PLAIN))
    assert names == [f"cuda:{index}" for index in range(count)]


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (None, [FIRST, SECOND, WHOLE]),
        ("0", [FIRST, SECOND]),
        ("1", ["cuda:0"]),
        ("MIG-dddd2", [SECOND]),
        (f"{SECOND},{FIRST}", [SECOND, FIRST]),
        ("0,1", [FIRST, SECOND, WHOLE]),
        ("GPU-cccc1", [FIRST, SECOND]),
        ("-1", []),
    ],
)
def test_each_mig_slice_is_a_device(value: str | None, names: list[str]) -> None:
    assert visible_devices(value, listed_gpus(CUT)) == names


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("0,0", "names 0 twice, which makes CUDA hide every GPU"),
        ("GPU-aaaa2,GPU-aaaa2222", "names GPU-aaaa2222 twice"),
        ("1,GPU-aaaa1", "mixes numbers, GPU-... and MIG-...; CUDA accepts only one kind"),
        ("GPU-aaaa1,1", "mixes numbers"),
        ("0,00", "names 00 twice"),
        ("3", "names GPU 3, but the driver lists 3"),
        ("0,9", "names GPU 9, but the driver lists 3"),
        ("cuda:0", "has 'cuda:0'; expected a number, GPU-... or MIG-..."),
        ("0 1", "has '0 1'; expected a number"),
        ("0,", "has ''; expected a number"),
        ("1gpu", "has '1gpu'; expected a number"),
        ("GPU-aaaa", "has GPU-aaaa, but the driver lists more than one matching device"),
        ("GPU-eeee", "has GPU-eeee, but the driver lists no matching device"),
        ("MIG-dddd1", "has MIG-dddd1, but the driver lists no matching device"),
    ],
)
def test_invalid_variable_is_an_error(value: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match="CUDA_VISIBLE_DEVICES=") as caught:
        visible_devices(value, listed_gpus(PLAIN))
    assert sentence in str(caught.value)


@pytest.mark.parametrize("value", ["MIG-dddd1,MIG-dddd1", f"MIG-dddd2,{SECOND}", "0,0"])
def test_duplicate_slice_is_an_error(value: str) -> None:
    with pytest.raises(ConfigurationError, match="twice"):
        visible_devices(value, listed_gpus(CUT))


def test_device_with_uuid_is_the_only_visible_one() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert seated("cuda:1", environ) == "cuda:1"
    assert environ == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert seated(FIRST, environ) == "cuda:0"
    assert environ == {"CUDA_VISIBLE_DEVICES": FIRST}


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake nvidia-smi that prints the file next to it."""
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\ncat "$(dirname "$0")/listed"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    listed = tmp_path / "listed"
    listed.write_text(PLAIN)
    return listed


def test_accelerators_of_this_machine(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.accelerators() == ["cuda:0", "cuda:1", "cuda:2"]
    assert why_none() == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert devices.accelerators() == ["cpu"]
    assert why_none() == "CUDA_VISIBLE_DEVICES='-1' hides every GPU"
    driver.write_text("Failed to initialize NVML: Driver/library version mismatch\n")
    assert devices.accelerators() == ["cpu"]
    assert "nvidia-smi lists no GPU: Failed to initialize NVML" in why_none()


def test_only_cpu_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.accelerators() == ["cpu"]
    assert why_none() == "nvidia-smi isn't on PATH"
