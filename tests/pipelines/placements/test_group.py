"""A group of real processes: orders arrive whole, idleness is harmless, a loss is seen at once."""

import os
import signal
import time

import pytest
import torch

from jobs.catalog import Model
from jobs.errors import ConfigurationError
from pipelines.placements.group import check_devices, check_world
from pipelines.placements.parcel import Parcel, pack, unpack
from tests.pipelines.placements.launch import code_of, start

SOON = 8.0
"""Seconds within which all must have ended, on a busy machine."""


@pytest.fixture
def launched(tmp_path):
    """Start ranks in a mode; kill what is left of them afterwards."""
    processes = []

    def launch(mode, world=2):
        processes.extend(start("bare", world, tmp_path, mode))
        return processes

    yield launch
    for process in processes:
        process.kill()
        process.join()


def heard(tmp_path, rank, words, seconds=60.0):
    """What a rank has printed, once it has printed `words`."""
    deadline = time.monotonic() + seconds
    log = tmp_path / f"rank{rank}.log"
    while words not in (text := log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline, text
        time.sleep(0.05)
    return text


def test_orders_arrive_whole_and_idleness_trips_no_timeout(launched, tmp_path):
    processes = launched("idle", world=3)
    assert [code_of(process, 60) for process in processes] == [0, 0, 0]
    assert "turn 2" in heard(tmp_path, 0, "ended")
    assert "lost" not in heard(tmp_path, 1, "ended")


@pytest.mark.parametrize("mode", ["work", "wait"])
def test_a_follower_that_dies_ends_the_group_within_seconds(launched, tmp_path, mode):
    processes = launched(mode, world=3)
    heard(tmp_path, 0, "turn 1")
    processes[1].kill()
    assert [code_of(p, SOON) for p in processes] == [71, -signal.SIGKILL, 71]
    assert "lost" in heard(tmp_path, 0, "lost")


@pytest.mark.parametrize("mode", ["work", "wait"])
def test_a_leader_that_dies_takes_its_followers_along(launched, tmp_path, mode):
    processes = launched(mode, world=3)
    heard(tmp_path, 0, "turn 1")
    processes[0].kill()
    assert [code_of(p, SOON) for p in processes] == [-signal.SIGKILL, 71, 71]


def test_a_rank_that_hangs_is_given_up_after_the_timeout(launched, tmp_path):
    leader, follower = launched("work")
    heard(tmp_path, 0, "turn 1")
    os.kill(follower.pid, signal.SIGSTOP)
    assert code_of(leader, 2 * SOON) == 71
    os.kill(follower.pid, signal.SIGCONT)
    assert code_of(follower, SOON) == 71


def test_the_leader_tells_what_another_rank_died_of(launched, tmp_path):
    processes = launched("raise")
    assert [code_of(process, 60) for process in processes] == [71, 71]
    assert "rank 1 failed: ValueError: no such luck" in heard(tmp_path, 0, "lost")


def test_a_parcel_holds_tensors_of_its_device_bit_for_bit():
    tensors = [torch.randn(3, 5).t(), torch.arange(3, dtype=torch.int16), torch.tensor([True])]
    parcel = pack({"a": tensors, "b": "text"}, torch.device("cpu"))
    again = unpack(Parcel(parcel.header, parcel.data.clone()))
    assert again["b"] == "text"
    for one, other in zip(tensors, again["a"], strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype
    assert pack(["text"], torch.device("cpu")).data is None


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({}, "takes 4 processes; RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": "2"}, r"takes 4 processes \(ring 2 x cfg 2\), but WORLD_SIZE is 2"),
    ],
)
def test_the_environment_must_have_the_entrys_ranks(monkeypatch, variables, sentence):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        if variables:
            monkeypatch.setenv(name, variables.get(name, "1"))
    with pytest.raises(ConfigurationError, match=sentence):
        check_world(Model("m", "", placement="context_parallel", ring=2, cfg=2))


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigurationError, match=r"there are only .* CUDA devices"):
        check_devices(torch.device("cuda", torch.cuda.device_count()))
