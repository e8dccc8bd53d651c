"""CUDA graphs: what is recorded, replayed, dropped and refused; the recording is faked.

Like a real graph, the fake keeps the buffers it was recorded with and overwrites the same output at
every replay. tests/gpu tests real graphs.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from structlog.testing import capture_logs

from jobs.errors import ConfigurationError
from pipelines import graphs
from pipelines.families import make_family
from pipelines.graphs import Graphs, check_graphs, cuda_capture, enable_graphs
from pipelines.load import load_pipeline
from pipelines.placements.family_pipeline import FamilyPipeline
from tests.pipelines.serving import alone, ask, entry, serve
from tests.pipelines.tiny import BUILDERS

# numpy 2 warns about a call in diffusers' schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


class Recorder:
    """Fakes recording; counts recordings, replays and new memory pools."""

    def __init__(self):
        self.recorded = self.replayed = self.pools = 0

    def __call__(self):
        self.pools += 1
        return self.capture

    def capture(self, run):
        self.recorded += 1
        output = run()

        def replay():
            self.replayed += 1
            for still, new in zip(tensors(output), tensors(run()), strict=True):
                still.copy_(new)

        for tensor in tensors(output):
            tensor.fill_(torch.nan)  # recording computes nothing
        return replay, output


def tensors(tree):
    return graphs._tensors(graphs.pytree.tree_leaves(tree))


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def graphed(recorder):
    """A graphed function of tensors, lists of them and numbers."""

    def forward(x, others, scale=1, **_):
        return (x * scale + sum(others), {"x": x + 1})

    return Graphs(forward, recorder, "cpu")


def test_one_recording_is_replayed_for_all_values(graphed, recorder):
    for value in (1.0, 2.0, 3.0):
        x, other = torch.full((2, 2), value), torch.full((2, 2), 10 * value)
        total, named = graphed(x, [other, other], scale=2)
        assert torch.equal(total, 2 * x + 2 * other)
        assert torch.equal(named["x"], x + 1)
    assert (recorder.recorded, recorder.replayed) == (1, 3)


def test_the_output_belongs_to_the_caller(graphed):
    first, _ = graphed(torch.zeros(2), [torch.zeros(2)])
    graphed(torch.ones(2), [torch.ones(2)])
    assert torch.equal(first, torch.zeros(2))


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.zeros(3, 2)},
        {"x": torch.zeros(2, 2, dtype=torch.float64)},
        {"x": torch.zeros(4, 2)[::2]},
        {"others": [torch.zeros(2, 2)] * 2},
        {"scale": 2},
        {"scale": 1.0},
        {"flag": None},
    ],
    ids=["shape", "dtype", "strides", "structure", "value", "type", "argument"],
)
def test_any_other_change_needs_another_graph(graphed, recorder, changed):
    usual = {"x": torch.zeros(2, 2), "others": [torch.zeros(2)], "scale": 1}
    graphed(**usual)
    graphed(**usual)
    assert recorder.recorded == 1
    graphed(**(usual | changed))
    assert recorder.recorded == 2


@pytest.mark.parametrize(
    ("device", "flag"), [("meta", None), ("cpu", {1, 2})], ids=["device", "unhashable"]
)
def test_inputs_that_a_graph_cannot_read_run_without_one(graphed, recorder, device, flag):
    x = torch.zeros(2, device=device)
    total, _ = graphed(x, [x], flag=flag)
    assert total.device == x.device
    assert recorder.recorded == 0


def test_the_least_recently_used_graph_is_dropped(graphed, recorder, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)

    def call(size):
        graphed(torch.zeros(size), [torch.zeros(size)])
        return recorder.recorded

    assert [call(size) for size in (1, 2, 1, 3, 1, 2)] == [1, 2, 2, 3, 3, 4]
    assert len(graphed.graphs) == 2


def test_after_many_shapes_all_graphs_are_recorded_again(graphed, recorder, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_SHAPES", 3)

    def call(size):
        graphed(torch.zeros(size), [torch.zeros(size)])
        return recorder.recorded, recorder.pools

    assert [call(size) for size in (1, 2, 3, 1)] == [(1, 1), (2, 1), (3, 1), (3, 1)]
    assert call(4) == (4, 2)
    assert call(1) == (5, 2)


def test_unrecordable_passes_run_without_a_graph_and_are_logged_once(recorder, monkeypatch):
    def forward(x):
        return x + 1

    def failing(run):
        if run().numel() == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nadvice")
        return recorder.capture(run)

    monkeypatch.setattr(Recorder, "__call__", lambda self: failing)
    graphed = Graphs(forward, recorder, "cpu")
    with capture_logs() as logs:
        for _ in range(3):
            assert torch.equal(graphed(torch.zeros(2)), torch.ones(2))
            assert torch.equal(graphed(torch.zeros(3)), torch.ones(3))
    assert [log["reason"] for log in logs] == ["operation not permitted when stream is capturing"]
    assert (recorder.recorded, recorder.replayed) == (1, 3)


def test_an_error_that_is_not_about_the_graph_is_raised(recorder):
    def forward(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Graphs(forward, recorder, "cpu")(torch.zeros(2))


@pytest.mark.parametrize("name", BUILDERS)
def test_replayed_pictures_are_the_same(tiny_pipe, recorder, name):
    length = {"QwenImage": 320, "Flux2": 320, "SD15": None, "SDXL": None}.get(name, 48)
    pipe = tiny_pipe(name)
    pipeline = FamilyPipeline(make_family(pipe, length))
    requests = [ask(seed=1, steps=3), ask("a blue dog on a beach", seed=2, steps=4)]
    arrivals = {0: requests[:1], 1: requests[1:]}
    plain, _ = serve(pipeline, arrivals, bucket=2)
    enable_graphs(getattr(pipe, "transformer", None) or pipe.unet, recorder)
    replayed, forwards = serve(pipeline, arrivals, bucket=2)
    assert 1 <= recorder.recorded < recorder.replayed == forwards
    for seed in (1, 2):
        assert torch.equal(plain[seed], replayed[seed])
    assert torch.equal(alone(pipeline, requests[0], bucket=2), plain[1])


# The device for recording; torch is faked.


class Current:
    """Fakes torch.cuda with two devices; records which one is current at each call."""

    def __init__(self, monkeypatch):
        self.now, self.seen = 0, []
        for name, stand_in in {
            "device": self.device,
            "stream": lambda stream: nullcontext(),
            "current_stream": lambda: Stream(self.now),
            "Stream": lambda device: Stream(device.index),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.note("replay")),
            "graph_pool_handle": lambda: "pool",
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def note(self, what):
        self.seen.append((what, self.now))

    @contextmanager
    def device(self, device):
        before, self.now = self.now, torch.device(device).index
        yield
        self.now = before

    def graph(self, graph, pool, stream, capture_error_mode):
        self.seen.append(("record", stream.device.index))
        return nullcontext()


class Stream:
    def __init__(self, index):
        self.device = torch.device("cuda", index)

    def wait_stream(self, other):
        assert other.device == self.device


def test_graphs_use_their_own_device_not_the_threads(monkeypatch):
    current = Current(monkeypatch)
    replay, _ = cuda_capture(torch.device("cuda:1"))(lambda: current.note("run"))
    replay()
    assert current.seen == [("run", 1), ("run", 1), ("record", 1), ("run", 1), ("replay", 1)]
    assert current.now == 0


def test_every_verb_sets_the_threads_device(tiny_pipe, monkeypatch):
    devices = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append(str(device)))
    pipeline = FamilyPipeline(make_family(tiny_pipe("Flux"), 48), device=torch.device("cuda:1"))
    [conditioning] = pipeline.encode([ask()])
    assert devices.pop() == "cuda:1"
    sample = pipeline.start(ask(), conditioning)
    assert devices.pop() == "cuda:1"
    pipeline.step([sample])
    assert devices.pop() == "cuda:1"
    pipeline.decode([sample])
    assert devices.pop() == "cuda:1"


# Refusals.


def test_cuda_graphs_are_refused_without_cuda(tiny_folder):
    model = entry(tiny_folder("Flux"), cuda_graphs=True)
    with pytest.raises(ConfigurationError, match="'tiny': cuda_graphs: needs a CUDA device"):
        load_pipeline(model, "cpu")


def test_cuda_graphs_are_allowed_for_a_replica_on_cuda():
    check_graphs(torch.device("cuda", 0))
