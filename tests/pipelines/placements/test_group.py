"""Groups of real processes: orders arrive intact, idle time is harmless, losses are noticed."""

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
from pipelines.placements.tensor_pickle import Payload, pack, unpack
from tests.pipelines.placements.launch import code_of, start
from tests.waiting import wait_until


@pytest.fixture
def launched(tmp_path):
    """Start ranks in a mode; kill any leftover processes afterwards."""
    processes = []

    def launch(mode, world=2, leader=()):
        processes.extend(start("bare", world, tmp_path, mode, leader=leader))
        return processes

    yield launch
    for process in processes:
        process.kill()
        process.join()


def output_of(tmp_path, rank, words):
    """A rank's output, once it contains `words`."""
    log = tmp_path / f"rank{rank}.log"
    return wait_until(lambda: log.exists() and words in (text := log.read_text()) and text)


def test_orders_arrive_intact_after_idle_time(launched, tmp_path):
    processes = launched("idle", world=3)
    assert [code_of(process) for process in processes] == [0, 0, 0]
    assert "turn 2" in output_of(tmp_path, 0, "ended")
    assert "lost" not in output_of(tmp_path, 1, "ended")


def test_leader_may_have_another_address_for_itself(launched):
    """On Debian a machine's own name resolves to 127.0.1.1, but only on that machine."""
    processes = launched("twice", leader=("127.0.1.1", "127.0.0.1"))
    assert [code_of(process) for process in processes] == [0, 0]


@pytest.mark.parametrize(
    ("address", "everywhere"),
    [("127.0.0.1", False), ("localhost", False), ("127.0.1.1", True), ("node-0", True)],
)
def test_leader_listens_beyond_the_machine_only_if_the_group_does(address, everywhere):
    with rendezvous.listen(address, 1) as server:
        assert (server.getsockname()[0] in ("::", "0.0.0.0")) == everywhere


def test_connections_without_the_secret_are_closed(monkeypatch):
    monkeypatch.setattr(rendezvous, "MEET_SECONDS", 0.2)
    secret = bytes(range(32))
    with rendezvous.listen("127.0.0.1", 4) as server, ExitStack() as stack:
        clients = []
        for greeting in (b"", b"hello", bytes(36), secret + (1).to_bytes(4)):
            clients.append(socket.create_connection(server.getsockname()))
            stack.callback(clients[-1].close)
            clients[-1].sendall(greeting)
        peers = rendezvous.accept(server, 1, secret)
        assert list(peers) == [1]
        peers[1].send_bytes(b"order")
        assert clients[-1].recv(9) == (5).to_bytes(4) + b"order"
        assert [client.recv(1) for client in clients[:-1]] == [b"", b"", b""]
        peers[1].close()


class Event:
    """A CUDA event that has completed by its `after`-th query."""

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
    """A group of one rank, with cuda:1 as its device."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(groups, "_abort_collectives", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device)
    group = Group(torch.device("cpu"), {})
    group.device = torch.device("cuda:1")
    return group


def test_forward_pass_waits_for_the_groups_own_device(group, monkeypatch):
    event = Event(after=3)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    with group.together():
        pass
    assert event.queries == 3
    assert event.stream == group.device
    assert group.lost is None


def test_device_that_hangs_loses_the_group(group, monkeypatch):
    group.seconds = 0.01
    monkeypatch.setattr(group, "_in_time", nullcontext)
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(after=10**9))
    with pytest.raises(GroupLost, match="cuda:1 hasn't finished after 0 seconds"), group.together():
        pass
    assert group.lost


def test_loss_releases_a_call_that_waits_for_the_device(group):
    group.seconds = 0.01
    freed = threading.Event()
    group.on_lost(lambda reason: freed.set())  # as the collective is, once it is aborted
    with pytest.raises(GroupLost, match="rank 0 hasn't finished"), group.together():
        freed.wait()


def test_event_of_a_lost_group_is_not_a_result(group, monkeypatch):
    event = Event(after=2, meanwhile=lambda: group.lose("rank 1 is gone"))
    with pytest.raises(GroupLost, match="rank 1 is gone"):
        group.wait_for(event)
    event = Event(after=1)
    with pytest.raises(GroupLost, match="rank 1 is gone"):
        group.wait_for(event)


@pytest.mark.parametrize("mode", ["work", "wait"])
def test_follower_that_dies_ends_the_group_without_timeouts(launched, tmp_path, mode):
    processes = launched(mode, world=3)
    output_of(tmp_path, 0, "turn 1")
    processes[1].kill()
    assert [code_of(p) for p in processes] == [71, -signal.SIGKILL, 71]
    assert "lost" in output_of(tmp_path, 0, "lost")


@pytest.mark.parametrize("mode", ["work", "wait"])
def test_leader_that_dies_ends_its_followers(launched, tmp_path, mode):
    processes = launched(mode, world=3)
    output_of(tmp_path, 0, "turn 1")
    processes[0].kill()
    assert [code_of(p) for p in processes] == [-signal.SIGKILL, 71, 71]


def test_rank_that_hangs_ends_the_group_after_the_timeout(launched, tmp_path):
    leader, follower = launched("hurry")
    output_of(tmp_path, 0, "in a hurry")
    os.kill(follower.pid, signal.SIGSTOP)
    assert code_of(leader) == 71
    os.kill(follower.pid, signal.SIGCONT)
    assert code_of(follower) == 71


def test_leader_reports_another_ranks_error(launched, tmp_path):
    processes = launched("raise")
    assert [code_of(process) for process in processes] == [71, 71]
    assert "rank 1 failed: ValueError: no such luck" in output_of(tmp_path, 0, "lost")


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (ImportError("no kernel\nadvice"), ConfigurationError, "rank 0 couldn't .*: no kernel$"),
        (ModelUnavailable("no file"), ModelUnavailable, "no file"),
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory, "CUDA out of memory"),
        (RuntimeError("[gloo/transport] closed by peer"), GroupLost, "gloo"),
        (dist.DistBackendError("aborted"), GroupLost, "aborted"),
        (GroupLost("rank 1 is gone"), GroupLost, "rank 1 is gone"),
    ],
)
def test_loading_raises_the_cause_of_rank_0s_own_failure(group, monkeypatch, raised, kind, message):
    monkeypatch.setattr(groups, "GRACE_SECONDS", 0.01)
    with pytest.raises(kind, match=message), leading(group), group.together():
        raise raised
    assert group.lost


def test_packed_tensors_are_restored_bit_for_bit():
    tensors = [torch.randn(3, 5).t(), torch.arange(3, dtype=torch.int16), torch.tensor([True])]
    payload = pack({"a": tensors, "b": "text"}, torch.device("cpu"))
    again = unpack(Payload(payload.header, payload.data.clone()))
    assert again["b"] == "text"
    for tensor, unpacked in zip(tensors, again["a"], strict=True):
        assert torch.equal(tensor, unpacked) and tensor.dtype == unpacked.dtype
    assert pack(["text"], torch.device("cpu")).data is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "takes 4 processes; .*not set: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, r"takes 4 processes \(ring 2 x cfg 2\), but WORLD_SIZE is 2"),
    ],
)
def test_environment_must_match_the_entrys_ranks(monkeypatch, variables, message):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        if variables:
            monkeypatch.setenv(name, variables.get(name, "1"))
    with pytest.raises(ConfigurationError, match=message):
        check_world(Model("m", "", placement="context_parallel", ring=2, cfg=2))


def test_missing_device_is_refused():
    with pytest.raises(ConfigurationError, match=r"there are only .* CUDA devices"):
        check_devices(torch.device("cuda", torch.cuda.device_count()))
