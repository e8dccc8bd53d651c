"""Channels between the ranks of a pipelined group: arguments, states between stages, outputs.

Sends don't wait for the receiver. Messages carry no numbers, so both ends of a channel must handle
forward passes in the same order; keeping that order is up to `pipelined`.
"""

from collections import deque
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipelines.placements.group import START_SECONDS, Group
from pipelines.placements.stages import State
from pipelines.placements.tensor_pickle import Payload, empty, pack, unpack


class SendQueue:
    """Asynchronous sends to one rank. Keeps their tensors until the receiver has them.

    `limit` is how many sends may be pending: those of the forward passes in flight. A further pass
    starts only after the output of the earliest is back, and by then its sends have been received,
    so waiting for the oldest send never blocks.
    """

    def __init__(self, to: int, process_group: Any, limit: int) -> None:
        self.to, self.process_group, self.limit = to, process_group, limit
        self._pending: deque[tuple[Any, torch.Tensor]] = deque()

    def send(self, tensor: torch.Tensor) -> None:
        """Send without waiting for the receiver."""
        # A plain `send` would wait for the receiver, and stages would compute one at a time. The
        # tensor must outlive the send, or its memory is reused while it's still being read.
        work = dist.isend(tensor, self.to, group=self.process_group)
        self._pending.append((work, tensor))
        while len(self._pending) > self.limit:
            oldest, _ = self._pending.popleft()
            oldest.wait()


class Links:
    """The channels between ranks: arguments from the leader to all, states from stage to stage,
    outputs to the leader.

    Each channel has its own process group, because messages of one group are handled in order, and
    arguments would wait behind a state that isn't computed yet. All ranks must create them
    together. `gather_output` is accelerate's. If False, the last rank sends the output to the
    leader alone, which is enough here because only the leader steps schedulers. If True, every
    rank gets it, but then each waits for the last one and nothing overlaps.
    """

    def __init__(self, group: Group, chunks: int, gather_output: bool = False) -> None:
        self.group = group
        self.rank, self.last, self.device = group.rank, group.size - 1, group.device
        self.gather_output = gather_output
        # `new_group` is collective: every rank creates all groups, those it isn't in too.
        inputs = [dist.new_group([0, rank]) for rank in range(1, group.size)]
        hops = [dist.new_group([rank, rank + 1]) for rank in range(self.last)]
        receivers = range(self.last if gather_output else 1)
        outputs = [dist.new_group([rank, self.last]) for rank in receivers]
        self.arguments = [SendQueue(rank, pg, chunks) for rank, pg in enumerate(inputs, 1)]
        self.onward = (
            SendQueue(self.rank + 1, hops[self.rank], chunks) if self.rank < self.last else None
        )
        self._from_leader = inputs[self.rank - 1] if self.rank else None
        self._from_before = hops[self.rank - 1] if self.rank else None
        self._outputs = outputs
        # Three messages per output: sizes, header, data.
        self._results = [SendQueue(rank, pg, 3 * chunks) for rank, pg in enumerate(outputs)]

    def send_state(self, state: State) -> None:
        """Send the blocks' state to the next stage, as one message."""
        assert self.onward is not None
        self.onward.send(torch.cat([tensor.reshape(-1) for tensor in state]))

    def receive_state(self, like: State) -> State:
        """Receive the previous stage's state, with the shapes of `like` and its first dtype."""
        flat = like[0].new_empty(sum(tensor.numel() for tensor in like))
        dist.recv(flat, self.rank - 1, group=self._from_before)
        parts = torch.split(flat, [tensor.numel() for tensor in like])
        return tuple(part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True))

    def receive_arguments(self, size: int) -> torch.Tensor | None:
        """Receive the data, `size` bytes, of the leader's payload."""
        return self._receive(size, 0, self._from_leader)

    def send_output(self, output: Any) -> None:
        """Last rank: send an output of any shape to the leader, or to all if gathering."""
        payload = pack(output, self.device)
        header = torch.frombuffer(bytearray(payload.header), dtype=torch.uint8)
        sizes = torch.tensor([header.numel(), payload.size])
        for result in self._results:
            result.send(sizes)
            result.send(header)
            if payload.data is not None:
                result.send(payload.data)

    def receive_output(self, seconds: float = START_SECONDS) -> Any:
        """Receive the last rank's next output. Raises RuntimeError after `seconds`."""
        process_group = self._outputs[self.rank]
        sizes = torch.empty(2, dtype=torch.int64)
        # Passed on each call, because gloo's receives ignore a timeout that was set on the group
        # after its creation.
        receipt: Any = dist.irecv(sizes, self.last, group=process_group)
        receipt.wait(timedelta(seconds=seconds))
        length, size = sizes.tolist()
        header = torch.empty(length, dtype=torch.uint8)
        dist.recv(header, self.last, group=process_group)
        data = self._receive(size, self.last, process_group)
        return unpack(Payload(header.numpy().tobytes(), data))

    def _receive(self, size: int, source: int, process_group: Any) -> torch.Tensor | None:
        """Receive bytes; they have arrived when this returns. Doesn't delay other threads' work.

        Raises GroupLost, and TimeoutError if they don't arrive within the group's timeout.
        """
        if self.device.type != "cuda":
            data = empty(size, self.device)
            if data is not None:
                dist.recv(data, source, group=process_group)
            return data
        # On CUDA a receive is queued on the current stream and would hold back the computation
        # that other threads queue there, so it gets a stream of its own.
        stream, done = torch.cuda.Stream(self.device), torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            data = empty(size, self.device)
            if data is not None:
                dist.recv(data, source, group=process_group)
            done.record(stream)
        self.group.wait_for(done)
        if data is not None:
            # Computation on the default stream reads it: the allocator mustn't reuse it before.
            data.record_stream(torch.cuda.default_stream(self.device))
        return data
