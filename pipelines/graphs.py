"""CUDA graphs of a denoiser's forward pass: recorded once per shape, then replayed.

A replay launches all kernels of a forward pass at once. That matters if the kernels are so small
that launching them one by one takes as long as running them. Inputs are copied into buffers that
the graph reads, and its output is copied out. A forward pass that can't be recorded runs without a
graph. This works for every family: a graph is identified by the shapes and dtypes of the tensors
anywhere in the arguments, and by all other arguments.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
import torch
from torch.utils import _pytree as pytree

from jobs.errors import ConfigurationError, first_line

MOST_GRAPHS = 16
"""Graphs kept at once; the least recently used one is dropped. Each has its own inputs and outputs;
intermediate memory is shared."""

MOST_SHAPES = 64
"""New shapes after which all graphs are dropped, and recorded again when they're next needed.

A graph reads tensors in a model's bounded caches, such as QwenImage's positions of the last 128
sizes, so it must be dropped before they're evicted."""

WARM_RUNS = 2
"""Forward passes before recording, in which libraries pick kernels and models fill caches."""

Run = Callable[[], Any]
Capture = Callable[[Run], tuple[Callable[[], None], Any]]
"""Records a run. Returns a function that repeats it, and the output that each repeat overwrites."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Graph:
    """A recorded forward pass: its input tensors, the function that replays it, and its output."""

    inputs: list[torch.Tensor]
    replay: Callable[[], None]
    output: Any


class Graphs:
    """A forward function that records and replays. Not thread-safe.

    Tensors must be on a device of `device_type`. Graphs made by the result of one `new_capture`
    call share memory with each other, and with no other graphs.
    """

    def __init__(
        self, forward: Callable[..., Any], new_capture: Callable[[], Capture], device_type: str
    ) -> None:
        self.forward = forward
        self.graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._new_capture, self._device_type = new_capture, device_type
        self._capture = new_capture()
        self._unrecordable: set[Hashable] = set()
        self._shapes = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass; the output belongs to the caller."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = self._key(leaves, spec)
        if key is None or key in self._unrecordable:
            return self.forward(*args, **kwargs)
        if key in self.graphs:
            self.graphs.move_to_end(key)
        elif not self._record(key, leaves, spec):
            return self.forward(*args, **kwargs)
        graph = self.graphs[key]
        for static, new in zip(graph.inputs, _tensors(leaves), strict=True):
            static.copy_(new)
        graph.replay()
        return pytree.tree_map_only(torch.Tensor, torch.clone, graph.output)

    def _key(self, leaves: list[Any], spec: Any) -> Hashable | None:
        """The arguments' description; equal ones can use the same graph. None if none can."""
        if any(t.device.type != self._device_type for t in _tensors(leaves)):
            return None
        described = tuple(_described(leaf) for leaf in leaves)
        try:
            hash(described)
        except TypeError:
            return None
        return str(spec), described

    def _record(self, key: Hashable, leaves: list[Any], spec: Any) -> bool:
        """Record the forward pass on copies of its inputs; False if that's not possible."""
        self._make_room()
        static = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(static, spec)
        try:
            replay, output = self._capture(lambda: self.forward(*args, **kwargs))
        except Exception as error:  # models can do many things that a graph doesn't support
            reason = first_line(error)
        else:
            self.graphs[key] = _Graph(_tensors(static), replay, output)
            return True
        # After the handler, because the error's traceback keeps the failed call's tensors alive.
        self._unrecordable.add(key)
        self._drop_all()  # the reason may be a lack of memory
        log.warning("no CUDA graph for a shape; it runs without", reason=reason)
        return False

    def _make_room(self) -> None:
        self._shapes += 1
        if self._shapes > MOST_SHAPES:
            self._shapes = 1
            self._drop_all()
        while len(self.graphs) >= MOST_GRAPHS:
            self.graphs.popitem(last=False)

    def _drop_all(self) -> None:
        """Drop all graphs and their shared memory pool, which no later graph can use."""
        self.graphs.clear()
        self._capture = self._new_capture()


def check_graphs(device: torch.device) -> None:
    """Refuse a device without CUDA graphs. Raises ConfigurationError."""
    if device.type != "cuda":
        raise ConfigurationError(f"cuda_graphs: needs a CUDA device, not {device.type!r}")


def enable_graphs(denoiser: Any, new_capture: Callable[[], Capture] | None = None) -> None:
    """Record and replay the denoiser's forward passes from now on."""
    forward: Callable[..., Any] = denoiser.forward
    new_capture = new_capture or partial(cuda_capture, denoiser.device)
    denoiser.forward = Graphs(forward, new_capture, denoiser.device.type)


def cuda_capture(device: torch.device) -> Capture:
    """A Capture that uses torch.cuda.graph; its graphs share memory for intermediate tensors.

    Sharing is safe because no two graphs run at once, outputs are copied out before the next one
    runs, and all are recorded on one stream with its own memory. The stream belongs to `device`: on
    a stream of another device (the thread's current device, or that of torch's own recording
    stream), a graph would silently record nothing.
    """
    pool, side = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(run: Run) -> tuple[Callable[[], None], Any]:
        with torch.cuda.device(device):
            return _captured(run, pool, side)

    return capture


def _captured(run: Run, pool: Any, side: Any) -> tuple[Callable[[], None], Any]:
    """Warm up and record on the stream `side`, whose device is the current one."""
    current = torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_RUNS):
            run()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # A failed capture leaves its own stream current, so restore it. Other threads encode and decode
    # in the meantime, so they must be allowed to allocate: thread_local.
    with (
        torch.cuda.stream(current),
        torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"),
    ):
        output = run()

    def replay() -> None:
        with torch.cuda.device(side.device):
            graph.replay()

    return replay, output


def _tensors(leaves: list[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _described(leaf: Any) -> Hashable:
    """A tensor's properties that a graph depends on; for other values the type and the value."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    described: Hashable = (type(leaf), leaf)
    return described
