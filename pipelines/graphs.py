"""CUDA graphs of a denoiser's forward pass: recorded once a shape, then replayed.

A replay launches all kernels of a forward pass at once, which counts where the kernels are so
small that launching them one by one takes as long as running them. Inputs are copied into buffers
that the graph reads, and its output is copied out. What cannot be recorded runs as it always did.
Knows no families: a forward pass is known by the shapes and dtypes of its tensors, wherever they
are in the arguments, and by all other arguments.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
import torch
from torch.utils import _pytree as pytree

from jobs.errors import ConfigurationError
from pipelines.seam import Pipeline

MOST_GRAPHS = 16
"""Graphs kept at once; the one least recently used goes. Each holds its inputs and outputs; the
memory in between is shared."""

MOST_SHAPES = 64
"""New shapes after which all graphs are let go, and recorded again when they are next needed.

A graph reads tensors that models keep in caches of bounded size, such as QwenImage's positions of
the last 128 sizes, and must not outlive them there."""

WARM_RUNS = 2
"""Forward passes before the recording, in which libraries pick kernels and models fill caches."""

Run = Callable[[], Any]
Capture = Callable[[Run], tuple[Callable[[], None], Any]]
"""Records what a run does; gives what repeats it, and the run's output, which each repeat fills."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Graph:
    """A recorded forward pass: the tensors it reads, what runs it, and what it fills."""

    inputs: list[torch.Tensor]
    replay: Callable[[], None]
    output: Any


class Graphs:
    """A forward function that records and replays; for one thread at a time.

    Tensors must be on a device of `device_type`. `new_capture` is called for graphs that shall
    share memory with one another, and with no others.
    """

    def __init__(
        self, forward: Callable[..., Any], new_capture: Callable[[], Capture], device_type: str
    ) -> None:
        self.forward = forward
        self.graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._new_capture, self._device_type = new_capture, device_type
        self._capture = new_capture()
        self._never: set[Hashable] = set()
        self._shapes = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass's output, the caller's own."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = self._key(leaves, spec)
        if key is None or key in self._never:
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
        """What a graph is good for; None for arguments that no graph can read."""
        if any(t.device.type != self._device_type for t in _tensors(leaves)):
            return None
        described = tuple(_described(leaf) for leaf in leaves)
        try:
            hash(described)
        except TypeError:
            return None
        return str(spec), described

    def _record(self, key: Hashable, leaves: list[Any], spec: Any) -> bool:
        """Record the forward pass on copies of its inputs; False when that cannot be done."""
        self._make_room()
        still = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(still, spec)
        try:
            replay, output = self._capture(lambda: self.forward(*args, **kwargs))
        except Exception as error:  # whatever a model does that a graph cannot hold
            reason = (str(error) or type(error).__name__).splitlines()[0]
        else:
            self.graphs[key] = _Graph(_tensors(still), replay, output)
            return True
        self._never.add(key)
        self._let_go()  # memory may be what was missing
        log.warning("no CUDA graph for a shape; it runs without", reason=reason)
        return False

    def _make_room(self) -> None:
        self._shapes += 1
        if self._shapes > MOST_SHAPES:
            self._shapes = 1
            self._let_go()
        while len(self.graphs) >= MOST_GRAPHS:
            self.graphs.popitem(last=False)

    def _let_go(self) -> None:
        """Forget all graphs and the memory that they share, which takes no others after them."""
        self.graphs.clear()
        self._capture = self._new_capture()


def check_graphs(pipeline: Pipeline, device: torch.device) -> None:
    """Refuse what cannot be recorded as a graph. Raises ConfigurationError."""
    if device.type != "cuda":
        raise ConfigurationError(f"cuda_graphs: needs a CUDA device, and this is {device.type!r}")
    if not pipeline.card.joins:
        raise ConfigurationError("cuda_graphs: a model that is called whole takes none")


def enable_graphs(denoiser: Any, new_capture: Callable[[], Capture] | None = None) -> None:
    """Have the denoiser's forward passes recorded and replayed."""
    forward: Callable[..., Any] = denoiser.forward
    new_capture = new_capture or partial(cuda_capture, denoiser.device)
    denoiser.forward = Graphs(forward, new_capture, denoiser.device.type)


def cuda_capture(device: torch.device) -> Capture:
    """Records with torch.cuda.graph; the graphs share the memory of what is neither in nor out.

    They may, since no two run at once and outputs are copied out before another one runs, and all
    are recorded on one stream, whose memory is no other's. It is one of `device`: on another one's,
    such as the thread's current device or that of torch's own stream for recording, a graph would
    record nothing and say nothing.
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
    # A capture that fails leaves its own stream the current one; and other threads, which
    # encode and decode meanwhile, may allocate.
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
    """A tensor by what a graph depends on, anything else by its type and value."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    described: Hashable = (type(leaf), leaf)
    return described
