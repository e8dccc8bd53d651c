"""Pipelined: the transformer's blocks over several ranks, several forward batches in flight.

Each rank has a stage of the blocks. A forward pass goes from rank to rank while the leader takes
the next one into the first stage, so that with `chunks` threads in the leader's `step` no rank
waits. All ranks get the transformer's arguments, since embeddings, positions and time are cheap and
made everywhere; from stage to stage only the blocks' state travels, and the output from the last
rank back to the leader. Whatever takes part keeps one order, that of the leader's first stage.

Knows no mathematics: a stage's forward is diffusers' own (see `stages`).
"""

import queue
import threading
from collections import deque
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any

import structlog
import torch
import torch.distributed as dist

from jobs.catalog import Model
from jobs.errors import ConfigurationError, GroupLost
from pipelines.acceleration import run_once
from pipelines.attention import backend_of, check_backend, choose_attention, set_backend
from pipelines.families import make_family
from pipelines.families.family import Family
from pipelines.loading.checkpoint import Checkpoint
from pipelines.loading.quantization import check_plain
from pipelines.out_of_memory import reports_out_of_memory
from pipelines.placements import group as ranks
from pipelines.placements.family_pipeline import FamilyPipeline
from pipelines.placements.group import (
    START_SECONDS,
    Group,
    Handler,
    check_devices,
    check_world,
    join,
)
from pipelines.placements.leader import FORWARD, Facade, Led, leading
from pipelines.placements.stages import Plan, Stage, State, load_stage, load_streamed, plan_stages
from pipelines.placements.tensor_pickle import Parcel, empty, pack, unpack
from pipelines.placements.verify import compare, record

BACKEND, STEADY = "backend", "steady"
"""Orders: to use an attention backend; to expect all that is sent to come soon from now on."""

STOP, REFUSE, LOST = "stop", "refuse", "lost"
"""What ends a follower; the last is not an order, but that there will be none."""

log = structlog.get_logger(__name__)


class Outbox:
    """Sends that may be under way. Keeps their tensors until the receiver has them.

    `room` is how many may be: those of the forward passes in flight, since no more begin before the
    output of the earliest is back, and all its sends with it.
    """

    def __init__(self, to: int, way: Any, room: int) -> None:
        self.to, self.way, self.room = to, way, room
        self._under_way: deque[tuple[Any, torch.Tensor]] = deque()

    def send(self, tensor: torch.Tensor) -> None:
        """Send without waiting for the receiver."""
        self._under_way.append((dist.isend(tensor, self.to, group=self.way), tensor))
        while len(self._under_way) > self.room:
            work, _ = self._under_way.popleft()
            work.wait()


class Line:
    """The ways between the ranks, each with a process group of its own, so that none waits for
    another: arguments from the leader to all, states from stage to stage, outputs to the leader.

    All ranks make theirs together. `gather_output` is accelerate's: False, and the output goes
    from the last rank to the leader alone, which is what this service needs, since only the leader
    steps schedulers; True, and every rank gets it, at the price that each waits for the last one
    before it goes on, and nothing overlaps.
    """

    def __init__(self, group: Group, chunks: int, gather_output: bool = False) -> None:
        self.group = group
        self.rank, self.last, self.device = group.rank, group.size - 1, group.device
        self.gather_output = gather_output
        inputs = [dist.new_group([0, rank]) for rank in range(1, group.size)]
        hops = [dist.new_group([rank, rank + 1]) for rank in range(self.last)]
        takers = range(self.last if gather_output else 1)
        outputs = [dist.new_group([rank, self.last]) for rank in takers]
        self.arguments = [Outbox(rank, way, chunks) for rank, way in enumerate(inputs, 1)]
        self.onward = (
            Outbox(self.rank + 1, hops[self.rank], chunks) if self.rank < self.last else None
        )
        self._from_leader = inputs[self.rank - 1] if self.rank else None
        self._from_before = hops[self.rank - 1] if self.rank else None
        self._outputs = outputs
        self._results = [Outbox(rank, way, 3 * chunks) for rank, way in enumerate(outputs)]

    def send_state(self, state: State) -> None:
        """Hand the blocks' state to the next stage, as one message."""
        assert self.onward is not None
        self.onward.send(torch.cat([tensor.reshape(-1) for tensor in state]))

    def receive_state(self, like: State) -> State:
        """The state of the stage before, of these shapes and of one dtype."""
        flat = like[0].new_empty(sum(tensor.numel() for tensor in like))
        dist.recv(flat, self.rank - 1, group=self._from_before)
        parts = torch.split(flat, [tensor.numel() for tensor in like])
        return tuple(part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True))

    def receive_arguments(self, size: int) -> torch.Tensor | None:
        """The data of the leader's parcel of so many bytes."""
        return self._receive(size, 0, self._from_leader)

    def send_output(self, output: Any) -> None:
        """Last rank: an output of whatever shape to whom it is due."""
        parcel = pack(output, self.device)
        header = torch.frombuffer(bytearray(parcel.header), dtype=torch.uint8)
        sizes = torch.tensor([header.numel(), parcel.size])
        for way in self._results:
            way.send(sizes)
            way.send(header)
            if parcel.data is not None:
                way.send(parcel.data)

    def receive_output(self, seconds: float = START_SECONDS) -> Any:
        """The next output of the last rank. Raises RuntimeError if it takes longer than that."""
        way = self._outputs[self.rank]
        sizes = torch.empty(2, dtype=torch.int64)
        # Said each time: what a gloo group is told later about timeouts, it forgets for these.
        coming: Any = dist.irecv(sizes, self.last, group=way)
        coming.wait(timedelta(seconds=seconds))
        length, size = sizes.tolist()
        header = torch.empty(length, dtype=torch.uint8)
        dist.recv(header, self.last, group=way)
        data = self._receive(size, self.last, way)
        return unpack(Parcel(header.numpy().tobytes(), data))

    def _receive(self, size: int, source: int, way: Any) -> torch.Tensor | None:
        """Bytes that are there when this returns, and that keep no other thread's work waiting.

        Raises GroupLost, and TimeoutError when they do not come in the group's time.
        """
        if self.device.type != "cuda":
            data = empty(size, self.device)
            if data is not None:
                dist.recv(data, source, group=way)
            return data
        stream, done = torch.cuda.Stream(self.device), torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            data = empty(size, self.device)
            if data is not None:
                dist.recv(data, source, group=way)
            done.record(stream)
        self.group.wait_for(done)
        if data is not None:
            data.record_stream(torch.cuda.default_stream(self.device))
        return data


class Head(Facade):
    """The leader's transformer: the first stage, and the outputs of the last one.

    May be called by several threads at once. Raises GroupLost in all of them when a rank dies,
    fails, or gives no output in time.
    """

    def __init__(self, stage: Stage, group: Group, line: Line) -> None:
        super().__init__(stage.module)
        self.group, self.line, self.stage = group, line, stage
        self.seconds = START_SECONDS
        stage.leave = line.send_state
        self._first_stage = threading.Lock()
        self._settling = threading.Lock()
        self._open: deque[Future[Any]] = deque()
        self._to_come: queue.SimpleQueue[Future[Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._collect, name="outputs", daemon=True).start()
        group.on_lost(self._give_up)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One forward pass by all ranks; the arguments and the output are the transformer's."""
        output: Future[Any] = Future()
        with self._first_stage, self.group.together():
            with self._settling:
                self._open.append(output)
            self._send((args, kwargs))
            self.stage.forward(*args, **kwargs)
            self._to_come.put(output)
        return output.result()

    def steady(self) -> None:
        """From here on, give a rank up that takes longer than GROUP_SECONDS."""
        self.group.send(STEADY)
        self.group.steady()
        self.seconds = ranks.GROUP_SECONDS

    def close(self) -> None:
        """No more forwards are coming."""
        self._to_come.put(None)

    def _send(self, arguments: Any) -> None:
        parcel = pack(arguments, self.line.device)
        self.group.tell(FORWARD, parcel)
        for way in self.line.arguments:
            if parcel.data is not None:
                way.send(parcel.data)

    def _collect(self) -> None:
        """Thread: outputs in the order of the forwards. Listens only when one is to come."""
        while (output := self._to_come.get()) is not None:
            try:
                received = self.line.receive_output(self.seconds)
            except Exception as error:  # whatever the transport raises, it is over
                self.group.lose(f"no output came from rank {self.line.last}: {error}")
                return
            with self._settling:
                if output.done():  # given up meanwhile
                    return
                self._open.popleft()
                output.set_result(received)

    def _give_up(self, reason: str) -> None:
        """No output will come any more."""
        with self._settling:
            while self._open:
                self._open.popleft().set_exception(GroupLost(reason))


class Hand:
    """A rank above 0: its stage, forward by forward in the leader's order.

    `output` is the last forward's at the last rank, and under `gather_output` at all of them.
    """

    def __init__(self, stage: Stage, group: Group, line: Line) -> None:
        self.stage, self.group, self.line = stage, group, line
        stage.enter, stage.leave = line.receive_state, line.send_state
        self.output: Any = None
        self._orders: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def run(self) -> None:
        """Follow until the leader says stop. Raises GroupLost, or what the leader refuses with."""
        threading.Thread(target=self._listen, name="orders", daemon=True).start()
        handlers: dict[str, Handler] = {
            FORWARD: self._forward,
            BACKEND: self._choose,
            STEADY: self._steady,
        }
        with torch.inference_mode():
            while (order := self._next())[0] not in (STOP, REFUSE):
                kind, value = order
                with self.group.together():
                    handlers[kind](value)
        self.group.leave()
        if order[0] == REFUSE:
            error, sentence = order[1]
            raise error(sentence)

    def _next(self) -> tuple[str, Any]:
        kind, value = self._orders.get()
        if kind == LOST:
            raise GroupLost(value)
        return kind, value

    def _listen(self) -> None:
        """Thread: take orders and their data while the stage computes; the leader must not wait."""
        kind = FORWARD
        while kind not in (STOP, REFUSE, LOST):
            try:
                kind, size, header = self.group.hear()
                value = unpack(Parcel(header, self.line.receive_arguments(size)))
            except Exception as error:  # whatever the transport raises, it is over
                self.group.lose(f"rank {self.group.rank} hears nothing more: {error}")
                kind, value = LOST, self.group.lost
            self._orders.put((kind, value))

    def _forward(self, arguments: tuple[Any, Any]) -> None:
        args, kwargs = arguments
        self.output = self.stage.forward(*args, **kwargs)
        if self.stage.is_last:
            self.line.send_output(self.output)
        elif self.line.gather_output:
            self.output = self.line.receive_output()

    def _choose(self, backend: str) -> None:
        set_backend(self.stage.module, backend)

    def _steady(self, _: None) -> None:
        self.group.steady()


class Streamed(Facade):
    """A transformer whose weights come as they are needed, and are on no device in between."""

    def __init__(self, behind: torch.nn.Module, device: torch.device) -> None:
        super().__init__(behind)
        self.device = device  # or diffusers might take "meta" for where the pipeline is

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer's own."""
        return self.behind(*args, **kwargs)


class Pipelined(Led):
    """A family over the ranks' stages. `in_flight` threads keep all of them busy."""

    def __init__(self, family: Family, group: Group, head: Head, chunks: int) -> None:
        super().__init__(family, group)
        self._head = head
        # A family whose step is a whole call has one scheduler for all its callers.
        self.in_flight = chunks if family.card.joins else 1

    def dismiss(self) -> None:
        """End the followers. Harmless when they are gone."""
        self._head.close()
        super().dismiss()


def load_pipelined(model: Model, checkpoint: Checkpoint, device: str) -> Pipelined:
    """Rank 0 on `device`: the text encoders, the autoencoder and the first stage; verified.

    Raises ConfigurationError, ModelUnavailable, OutOfMemory, GroupLost.
    """
    plan = _plan(model, checkpoint, device)
    group = join(model, device)
    with leading(group):
        line = Line(group, model.chunks)
        return _lead(model, checkpoint, plan, group, line)


def _lead(model: Model, checkpoint: Checkpoint, plan: Plan, group: Group, line: Line) -> Pipelined:
    stage = reports_out_of_memory(load_stage)(plan, 0, group.device)
    pipe = checkpoint.load(model, transformer=stage.module)
    family = make_family(reports_out_of_memory(pipe.to)(group.device), model.max_sequence_length)
    whole = load_streamed(plan_stages(model, checkpoint), group.device)
    pipe.transformer, alone = Streamed(whole, group.device), FamilyPipeline(family)
    choose_attention(whole, model.attention_backend, group.device, partial(run_once, alone, model))
    references, backend = record(alone, model), backend_of(whole)
    head = Head(stage, group, line)
    pipe.transformer = head
    if backend is not None:
        set_backend(stage.module, backend)
        group.send(BACKEND, backend)
    compare(references, head)
    head.steady()
    log.info("verified group", model=model.name, ranks=group.size, stage=stage.own)
    return Pipelined(family, group, head, model.chunks)


def follow_pipelined(model: Model, checkpoint: Checkpoint, device: str) -> Hand:
    """A rank above 0 on `device`: its stage and nothing else. Raises as rank 0 does."""
    plan = _plan(model, checkpoint, device)
    group = join(model, device)
    try:
        line = Line(group, model.chunks)
        stage = reports_out_of_memory(load_stage)(plan, group.rank, group.device)
    except BaseException as error:
        group.lose(f"rank {group.rank} could not load its stage: {error}")
        raise
    return Hand(stage, group, line)


def _plan(model: Model, checkpoint: Checkpoint, device: str) -> Plan:
    """What can be known before anything is loaded or joined; the same verdict on every rank."""
    check_extras(model, checkpoint)
    if model.attention_backend is not None:
        check_backend(model.attention_backend)
    check_devices(torch.device(device))
    plan = plan_stages(model, checkpoint)
    check_world(model)
    return plan


def check_extras(model: Model, checkpoint: Checkpoint) -> None:
    """Refuse what stages can't serve. Raises ConfigurationError."""
    check_plain(model, checkpoint, "pipelined")
    for name in ("cache", "compile", "cuda_graphs"):
        if getattr(model, name):
            raise ConfigurationError(f"{name} is not served together with pipelined")
