"""A group of real processes: orders arrive whole, idleness is harmless, a loss is seen at once."""

import os
import signal
import socket
import threading
from contextlib import ExitStack, nullcontext

import pytest
import torch
import torch.distributed as dist

from jobs.catalog import Model
from jobs.errors import ConfigurationError, GroupLost, ModelUnavailable, OutOfMemory
from pipelines.placements import group as groups
from pipelines.placements import rendezvous
from pipelines.placements.group import Group, check_devices, check_world
from pipelines.placements.leader import leading
from pipelines.placements.tensor_pickle import Parcel, pack, unpack
from tests.pipelines.placements.launch import code_of, start
from tests.waiting import wait_until


@pytest.fixture
def launched(tmp_path):
    """Start ranks in a mode; kill what is left of them afterwards."""
    processes = []

    def launch(mode, world=2, leader=()):
        processes.extend(start("bare", world, tmp_path, mode, leader=leader))
        return processes

    yield launch
    for process in processes:
        process.kill()
        process.join()


def heard(tmp_path, rank, words):
    """What a rank has printed, once it has printed `words`."""
    log = tmp_path / f"rank{rank}.log"
    return wait_until(lambda: log.exists() and words in (text := log.read_text()) and text)


def test_orders_arrive_whole_and_idleness_trips_no_timeout(launched, tmp_path):
    processes = launched("idle", world=3)
    assert [code_of(process) for process in processes] == [0, 0, 0]
    assert "turn 2" in heard(tmp_path, 0, "ended")
    assert "lost" not in heard(tmp_path, 1, "ended")


def test_a_leader_may_know_itself_by_another_address(launched):
    """On Debian a machine's own name means 127.0.1.1 to itself, and to no other machine."""
    processes = launched("twice", leader=("127.0.1.1", "127.0.0.1"))
    assert [code_of(process) for process in processes] == [0, 0]


@pytest.mark.parametrize(
    ("address", "everywhere"),
    [("127.0.0.1", False), ("localhost", False), ("127.0.1.1", True), ("node-0", True)],
)
def test_orders_leave_the_machine_only_where_a_group_may(address, everywhere):
    with rendezvous.listen(address, 1) as server:
        assert (server.getsockname()[0] in ("::", "0.0.0.0")) == everywhere


def test_who_does_not_know_the_secret_is_sent_away_and_keeps_nobody_waiting(monkeypatch):
    monkeypatch.setattr(rendezvous, "MEET_SECONDS", 0.2)
    secret = bytes(range(32))
    with rendezvous.listen("127.0.0.1", 4) as server, ExitStack() as stack:
        lines = []
        for greeting in (b"", b"hello", bytes(36), secret + (1).to_bytes(4)):
            lines.append(socket.create_connection(server.getsockname()))
            stack.callback(lines[-1].close)
            lines[-1].sendall(greeting)
        peers = rendezvous.accept(server, 1, secret)
        assert list(peers) == [1]
        peers[1].send_bytes(b"order")
        assert lines[-1].recv(9) == (5).to_bytes(4) + b"order"
        assert [line.recv(1) for line in lines[:-1]] == [b"", b"", b""]
        peers[1].close()


class Event:
    """A CUDA event that has happened at the query of that number."""

    def __init__(self, after, meanwhile=None):
        self.after, self.meanwhile, self.queries = after, meanwhile, 0

    def record(self, stream=None):
        self.stream = stream

    def query(self):
        self.queries += 1
        if self.meanwhile:
            self.meanwhile()
        return self.queries >= self.after


@pytest.fixture
def group(monkeypatch):
    """A group of one, which takes its device for cuda:1."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(groups, "_abort_collectives", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device)
    made = Group(torch.device("cpu"), {})
    made.device = torch.device("cuda:1")
    return made


def test_the_end_of_a_forward_pass_is_waited_for_on_the_groups_own_device(group, monkeypatch):
    event = Event(after=3)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    with group.together():
        pass
    assert event.queries == 3
    assert event.stream == group.device
    assert group.lost is None


def test_a_device_that_does_not_end_loses_the_group(group, monkeypatch):
    group.seconds = 0.01
    monkeypatch.setattr(group, "_in_time", nullcontext)
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(after=10**9))
    with pytest.raises(GroupLost, match="cuda:1 has not ended after 0 seconds"), group.together():
        pass
    assert group.lost


def test_a_call_that_waits_for_the_device_is_freed_by_the_loss(group):
    group.seconds = 0.01
    freed = threading.Event()
    group.on_lost(lambda reason: freed.set())  # as the collective is, once it is aborted
    with pytest.raises(GroupLost, match="rank 0 has not ended"), group.together():
        freed.wait()


def test_what_ended_only_because_the_group_was_lost_is_no_result(group, monkeypatch):
    event = Event(after=2, meanwhile=lambda: group.lose("rank 1 is gone"))
    with pytest.raises(GroupLost, match="rank 1 is gone"):
        group.wait_for(event)
    event = Event(after=1)
    with pytest.raises(GroupLost, match="rank 1 is gone"):
        group.wait_for(event)


@pytest.mark.parametrize("mode", ["work", "wait"])
def test_a_follower_that_dies_ends_the_group_without_any_timeout(launched, tmp_path, mode):
    processes = launched(mode, world=3)
    heard(tmp_path, 0, "turn 1")
    processes[1].kill()
    assert [code_of(p) for p in processes] == [71, -signal.SIGKILL, 71]
    assert "lost" in heard(tmp_path, 0, "lost")


@pytest.mark.parametrize("mode", ["work", "wait"])
def test_a_leader_that_dies_takes_its_followers_along(launched, tmp_path, mode):
    processes = launched(mode, world=3)
    heard(tmp_path, 0, "turn 1")
    processes[0].kill()
    assert [code_of(p) for p in processes] == [-signal.SIGKILL, 71, 71]


def test_a_rank_that_hangs_is_given_up_after_the_timeout(launched, tmp_path):
    leader, follower = launched("hurry")
    heard(tmp_path, 0, "in a hurry")
    os.kill(follower.pid, signal.SIGSTOP)
    assert code_of(leader) == 71
    os.kill(follower.pid, signal.SIGCONT)
    assert code_of(follower) == 71


def test_the_leader_tells_what_another_rank_died_of(launched, tmp_path):
    processes = launched("raise")
    assert [code_of(process) for process in processes] == [71, 71]
    assert "rank 1 failed: ValueError: no such luck" in heard(tmp_path, 0, "lost")


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (ImportError("no kernel\nadvice"), ConfigurationError, "rank 0 cannot .*: no kernel$"),
        (ModelUnavailable("no file"), ModelUnavailable, "no file"),
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory, "CUDA out of memory"),
        (RuntimeError("[gloo/transport] closed by peer"), GroupLost, "gloo"),
        (dist.DistBackendError("aborted"), GroupLost, "aborted"),
        (GroupLost("rank 1 is gone"), GroupLost, "rank 1 is gone"),
    ],
)
def test_while_loading_what_rank_0_did_itself_is_told_by_its_cause(
    group, monkeypatch, raised, kind, said
):
    monkeypatch.setattr(groups, "GRACE_SECONDS", 0.01)
    with pytest.raises(kind, match=said), leading(group), group.together():
        raise raised
    assert group.lost


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
