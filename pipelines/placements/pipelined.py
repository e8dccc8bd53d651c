"""Pipelined: the transformer's blocks over several ranks, several forward batches in flight.

Each rank has a stage, which is a part of the blocks. A forward pass goes from rank to rank.
Meanwhile the leader starts the next one in the first stage: it calls `step` from `chunks` threads.
All ranks get the transformer's arguments, because embeddings, positions and timesteps are cheap
enough to compute on every rank. Only the blocks' state goes from stage to stage, and the output
goes from the last rank back to the leader.

Messages have no numbers, so a receiver can tell forward passes apart only by their order. Every
rank therefore handles them in the order in which they enter the leader's first stage.

A stage's forward is diffusers' own (see `stages`), so there's no code for particular models here.
"""

import queue
import threading
from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import Any

import structlog
import torch

from jobs.catalog import Model
from jobs.errors import GroupLost
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
from pipelines.placements.leader import FORWARD, GroupPipeline, ModuleProxy, leading
from pipelines.placements.links import Links
from pipelines.placements.stages import Stage, StagePlan, load_stage, load_streamed, plan_stages
from pipelines.placements.tensor_pickle import Payload, pack, unpack
from pipelines.placements.verify import compare, record

BACKEND, STEADY = "backend", "steady"
"""Orders: use an attention backend; apply the short timeout to messages from now on."""

STOP, REFUSE, LOST = "stop", "refuse", "lost"
"""What ends a follower: two orders, and LOST, which means that no order can arrive any more."""

log = structlog.get_logger(__name__)


class Head(ModuleProxy):
    """The leader's transformer: runs the first stage and returns the last one's outputs.

    Several threads may call it at once. Raises GroupLost in all of them if a rank dies, fails, or
    returns no output in time.
    """

    def __init__(self, stage: Stage, group: Group, links: Links) -> None:
        super().__init__(stage.module)
        self.group, self.links, self.stage = group, links, stage
        self.seconds = START_SECONDS
        stage.leave = links.send_state
        self._first_stage = threading.Lock()
        self._settling = threading.Lock()
        self._open: deque[Future[Any]] = deque()
        self._expected: queue.SimpleQueue[Future[Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._collect, name="outputs", daemon=True).start()
        group.on_lost(self._give_up)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one forward pass on all ranks, with the transformer's arguments and output."""
        output: Future[Any] = Future()
        # One lock over sending, computing and queuing the future makes the order of arguments, of
        # states and of expected outputs the same. The output is awaited outside the lock, so
        # another thread's pass enters the first stage meanwhile.
        with self._first_stage, self.group.together():
            with self._settling:
                self._open.append(output)  # before anything can fail, so `_give_up` finds it
            self._send((args, kwargs))
            self.stage.forward(*args, **kwargs)
            self._expected.put(output)
        return output.result()

    def steady(self) -> None:
        """From now on, lose the group if a rank takes longer than GROUP_SECONDS."""
        self.group.send(STEADY)
        self.group.steady()
        self.seconds = ranks.GROUP_SECONDS

    def close(self) -> None:
        """End the thread that collects outputs; no more forward passes may start."""
        self._expected.put(None)

    def _send(self, arguments: Any) -> None:
        payload = pack(arguments, self.links.device)
        self.group.announce(FORWARD, payload)
        if payload.data is not None:
            for sends in self.links.arguments:
                sends.send(payload.data)

    def _collect(self) -> None:
        """Thread: match outputs to futures, in the order of the forward passes.

        Receives only while an output is expected, so idle time never counts as a timeout.
        """
        while (output := self._expected.get()) is not None:
            try:
                received = self.links.receive_output(self.seconds)
            except Exception as error:  # any transport error means that outputs are lost
                self.group.lose(f"no output from rank {self.links.last}: {error}")
                return
            with self._settling:
                if output.done():  # `_give_up` ran meanwhile
                    return
                self._open.popleft()
                output.set_result(received)

    def _give_up(self, reason: str) -> None:
        """Fail all open forward passes, because no output will arrive any more."""
        with self._settling:
            while self._open:
                self._open.popleft().set_exception(GroupLost(reason))


class StageFollower:
    """A rank above 0: runs its stage for each forward pass, in the leader's order.

    `output` is that of the last forward pass, on the last rank, or on all with `gather_output`.
    """

    def __init__(self, stage: Stage, group: Group, links: Links) -> None:
        self.stage, self.group, self.links = stage, group, links
        stage.enter, stage.leave = links.receive_state, links.send_state
        self.output: Any = None
        self._orders: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def run(self) -> None:
        """Follow until the leader says stop. Raises GroupLost, or the leader's refusal."""
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
            error, message = order[1]
            raise error(message)

    def _next(self) -> tuple[str, Any]:
        kind, value = self._orders.get()
        if kind == LOST:
            raise GroupLost(value)
        return kind, value

    def _listen(self) -> None:
        """Thread: receive orders and their data even while the stage computes.

        Otherwise the leader's sends of later passes would pile up, and it would have to wait.
        """
        kind = FORWARD
        while kind not in (STOP, REFUSE, LOST):
            try:
                kind, size, header = self.group.next_order()
                value = unpack(Payload(header, self.links.receive_arguments(size)))
            except Exception as error:  # any transport error means that orders are lost
                self.group.lose(f"rank {self.group.rank} can't receive orders: {error}")
                kind, value = LOST, self.group.lost
            self._orders.put((kind, value))

    def _forward(self, arguments: tuple[Any, Any]) -> None:
        args, kwargs = arguments
        self.output = self.stage.forward(*args, **kwargs)
        if self.stage.is_last:
            self.links.send_output(self.output)
        elif self.links.gather_output:
            self.output = self.links.receive_output()

    def _choose(self, backend: str) -> None:
        set_backend(self.stage.module, backend)

    def _steady(self, _: None) -> None:
        self.group.steady()


class StreamedTransformer(ModuleProxy):
    """A transformer that loads each layer's weights when it runs and drops them afterwards."""

    def __init__(self, behind: torch.nn.Module, device: torch.device) -> None:
        super().__init__(behind)
        self.device = device  # else diffusers might take "meta" for the pipeline's device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the transformer behind."""
        return self.behind(*args, **kwargs)


class Pipelined(GroupPipeline):
    """A family over the ranks' stages; with `in_flight` threads, all stages can be busy at once."""

    def __init__(self, family: Family, group: Group, head: Head, chunks: int) -> None:
        super().__init__(family, group)
        self._head = head
        # A family whose step is a whole call has one scheduler for all its callers.
        self.in_flight = chunks if family.card.joins else 1

    def dismiss(self) -> None:
        """End the followers. Does nothing if they're gone already."""
        self._head.close()
        super().dismiss()


def load_pipelined(model: Model, checkpoint: Checkpoint, device: str) -> Pipelined:
    """Load and verify rank 0: the text encoders, the autoencoder and the first stage.

    Raises ConfigurationError, ModelUnavailable, OutOfMemory, GroupLost.
    """
    plan = _plan(model, checkpoint, device)
    group = join(model, device)
    with leading(group):
        links = Links(group, model.chunks)
        return _lead(model, checkpoint, plan, group, links)


def _lead(
    model: Model, checkpoint: Checkpoint, plan: StagePlan, group: Group, links: Links
) -> Pipelined:
    stage = reports_out_of_memory(load_stage)(plan, 0, group.device)
    pipe = checkpoint.load(model, transformer=stage.module)
    family = make_family(reports_out_of_memory(pipe.to)(group.device), model.max_sequence_length)
    # The whole transformer may be larger than this device, so the reference is computed layer by
    # layer. The attention kernel is chosen on it too, before the stages use it.
    whole = load_streamed(plan_stages(model, checkpoint), group.device)
    pipe.transformer, alone = StreamedTransformer(whole, group.device), FamilyPipeline(family)
    choose_attention(whole, model.attention_backend, group.device, partial(run_once, alone, model))
    references, backend = record(alone, model), backend_of(whole)
    head = Head(stage, group, links)
    pipe.transformer = head
    if backend is not None:
        set_backend(stage.module, backend)
        group.send(BACKEND, backend)
    compare(references, head)
    head.steady()
    log.info("verified group", model=model.name, ranks=group.size, stage=stage.own)
    return Pipelined(family, group, head, model.chunks)


def follow_pipelined(model: Model, checkpoint: Checkpoint, device: str) -> StageFollower:
    """Load a rank above 0: its stage and nothing else. Raises as rank 0 does."""
    plan = _plan(model, checkpoint, device)
    group = join(model, device)
    try:
        links = Links(group, model.chunks)
        stage = reports_out_of_memory(load_stage)(plan, group.rank, group.device)
    except BaseException as error:
        group.lose(f"rank {group.rank} couldn't load its stage: {error}")
        raise
    return StageFollower(stage, group, links)


def _plan(model: Model, checkpoint: Checkpoint, device: str) -> StagePlan:
    """Check and plan before loading or joining, so that every rank refuses the same entries."""
    check_plain(checkpoint, model.placement)
    if model.attention_backend is not None:
        check_backend(model.attention_backend)
    check_devices(torch.device(device))
    plan = plan_stages(model, checkpoint)
    check_world(model)
    return plan
