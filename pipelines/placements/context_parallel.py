"""Context parallelism: one image's tokens over a group of ranks, using diffusers' attention.

A group has cfg x ring x ulysses ranks, or cfg x tensor. Ring and Ulysses split the tokens of a
forward pass (both together: unified attention), tensor parallelism splits the weights, and cfg
splits the rows: the positive and negative halves of guidance run on different ranks. If tokens or
heads don't divide evenly, diffusers' "anything" variants of ring and Ulysses are used. Unified
attention has no such variant, so it refuses those sizes.

Every rank holds the transformer or a slice of it; only rank 0 holds the rest of the model.
Combinations that would compute a wrong image are refused at start or, if that depends on the
image's size, when the image starts. Before rank 0 serves, `verify` compares the group with a
single device.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any

import structlog
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.functional import pad

from jobs.catalog import Model
from jobs.errors import ConfigurationError, ImageFailed
from pipelines.acceleration import run_once
from pipelines.attention import (
    backend_of,
    check_parallel,
    choose_attention,
    set_backend,
)
from pipelines.families import make_family
from pipelines.loading.checkpoint import Checkpoint
from pipelines.out_of_memory import reports_out_of_memory
from pipelines.placements import diffusers_patches
from pipelines.placements.arguments import by_name, some_rows
from pipelines.placements.context_parallel_checks import SizeCheck, check_entry
from pipelines.placements.family_pipeline import FamilyPipeline
from pipelines.placements.group import Group, Handler, follow, join
from pipelines.placements.leader import FORWARD, GroupPipeline, GroupTransformer, leading
from pipelines.placements.tensor_parallel import load_slices
from pipelines.placements.transformer_classes import ParallelPlan, parallel_plan_of
from pipelines.placements.verify import compare, record

SHARD = "shard"
"""Order: shard the transformer; the value is the attention backend."""

STEADY = "steady"
"""Order: apply the short timeout to collectives from now on."""

log = structlog.get_logger(__name__)


def load_context_parallel(model: Model, checkpoint: Checkpoint, device: str) -> GroupPipeline:
    """Rank 0: join the group, load everything onto `device`, shard, verify.

    Raises ConfigurationError, ModelUnavailable, OutOfMemory, GroupLost.
    """
    plan = check_entry(model, checkpoint, device)
    group = join(model, device)
    with leading(group):
        return _load(model, checkpoint, plan, group)


def _load(model: Model, checkpoint: Checkpoint, plan: ParallelPlan, group: Group) -> GroupPipeline:
    pipe = checkpoint.load(model)
    place = _place_whole(pipe, model, group.device)
    family = make_family(pipe, model.max_sequence_length)
    transformer, alone = pipe.transformer, FamilyPipeline(family)
    if place == group.device:  # else kernels can't be tried: the whole transformer isn't there
        trial = partial(run_once, alone, model)
        choose_attention(transformer, model.attention_backend, place, trial)
    backend = backend_of(transformer) or model.attention_backend
    check_parallel(backend, model.ring, model.ring * model.ulysses > 1, group.device)
    # Record before sharding: afterwards there's no whole transformer left to compare with.
    references = record(alone, model, place, group.device)
    check = SizeCheck(model, plan, alone)
    try:
        check(references.request)
    except ImageFailed as error:
        raise ConfigurationError(f"defaults: {error}") from error
    if model.tensor > 1:
        # Every rank, including this one, reads its slices from the checkpoint, so free the whole
        # transformer first.
        pipe.transformer = transformer = None
    group.send(SHARD, backend)
    with group.together():
        share = sharded(model, checkpoint, transformer, group, backend)
    pipe.transformer = GroupTransformer(share.transformer, group, share)
    compare(references, pipe.transformer)
    # Loading and first calls take long and differ between ranks; from here on a slow collective
    # means that a rank hangs.
    group.send(STEADY)
    group.steady()
    log.info("verified group", model=model.name, ranks=group.size, backend=backend)
    return GroupPipeline(family, group, check)


def _place_whole(pipe: Any, model: Model, device: torch.device) -> torch.device:
    """Move the model to the device, except a transformer that's too large before it is split.

    Returns where the whole transformer is: "cpu" if only slices of it fit the device.
    """
    move = reports_out_of_memory(pipe.to)
    if model.tensor > 1 and device.type == "cuda":
        size = sum(p.numel() * p.element_size() for p in pipe.transformer.parameters())
        if size > ROOM * torch.cuda.mem_get_info(device)[0]:
            for name, component in pipe.components.items():
                if isinstance(component, torch.nn.Module) and name != "transformer":
                    reports_out_of_memory(component.to)(device)
            return torch.device("cpu")
    move(device)
    return device


ROOM = 0.5
"""Share of a device's free memory for a whole transformer; the rest is for encoders and images."""


def follow_context_parallel(
    model: Model, checkpoint: Checkpoint, device: str
) -> "ContextParallelFollower":
    """Rank above 0: join and load only the transformer onto `device`. Raises as rank 0 does."""
    check_entry(model, checkpoint, device)
    group = join(model, device)
    transformer = None
    try:
        if model.tensor == 1:
            others = {name: None for name in checkpoint.components if name not in _FOLLOWER_HAS}
            pipe = checkpoint.load(model, **others)
            transformer = reports_out_of_memory(pipe.transformer.to)(group.device)
    except BaseException as error:
        group.lose(f"rank {group.rank} couldn't load the model: {error}")
        raise
    return ContextParallelFollower(model, checkpoint, transformer, group)


_FOLLOWER_HAS = ("transformer", "scheduler")
"""Components that a follower loads; it gets None for all others."""


class ContextParallelFollower:
    """A rank above 0: runs its share of every forward pass that the leader announces."""

    def __init__(
        self, model: Model, checkpoint: Checkpoint, transformer: Any, group: Group
    ) -> None:
        self.model, self.checkpoint = model, checkpoint
        self.transformer, self.group = transformer, group
        self.share: Share | None = None

    def run(self) -> None:
        """Follow until the leader says stop. Raises GroupLost, or the leader's refusal."""
        handlers: dict[str, Handler] = {
            SHARD: self._shard,
            FORWARD: self._forward,
            STEADY: self._steady,
        }
        with torch.inference_mode():
            follow(self.group, handlers)

    def _shard(self, backend: str | None) -> None:
        self.share = sharded(self.model, self.checkpoint, self.transformer, self.group, backend)

    def _forward(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        assert self.share is not None
        args, kwargs = call
        self.share(*args, **kwargs)

    def _steady(self, _: None) -> None:
        self.group.steady()


def sharded(
    model: Model, checkpoint: Checkpoint, transformer: Any, group: Group, backend: str | None
) -> "Share":
    """This rank's share of the transformer. With tensor parallelism, its slices are loaded here.

    Every rank must call it, because the mesh and the slices are made by collectives.
    """
    diffusers_patches.install()
    mesh = _mesh(model, group)
    if model.tensor > 1:
        kind = getattr(import_module("diffusers"), checkpoint.components["transformer"])
        transformer = load_slices(model, checkpoint, kind, mesh, group.device)
    if backend is not None:
        set_backend(transformer, backend)
    return Share(model, transformer, mesh)


class Share:
    """This rank's part of the transformer, as a callable that runs the whole group's forward pass.

    Every rank calls it with the same arguments, those of the transformer, and gets the whole
    output, as the tuple that `return_dict=False` returns.
    """

    def __init__(self, model: Model, transformer: Any, mesh: DeviceMesh) -> None:
        self.transformer, self.mesh = transformer, mesh
        self.plan = parallel_plan_of(type(transformer).__name__)
        self.cfg, self.degree = model.cfg, model.ring * model.ulysses
        self.slices = model.tensor > 1
        self.config: Any = None
        self._heads_divide = transformer.config[self.plan.heads] % model.ulysses == 0
        if self.degree > 1:
            self.config = ContextParallelConfig(
                ring_degree=model.ring, ulysses_degree=model.ulysses, mesh=mesh
            )
            split = self.plan.split(transformer) if self.plan.split else None
            with diffusers_patches.on_cpu():
                transformer.enable_parallelism(config=self.config, cp_plan=split)
            _leave_whole(transformer, self.plan)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the group's forward pass; collective."""
        arguments = by_name(self.transformer, args, kwargs)
        rows = len(arguments[self.plan.rows[0]])
        own_rows = self._rows_here(rows)
        part = arguments if self.cfg == 1 else some_rows(self.plan, arguments, own_rows)
        if self.config is not None:
            part = self._configured(part)
        with _plain_tensors() if self.slices else nullcontext():
            output = self.transformer(**part)[0]
        if self.cfg > 1:
            output = self._joined(output, arguments[self.plan.rows[0]], rows)
        return (output,)

    def _rows_here(self, rows: int) -> list[int]:
        """This rank's rows, in order. Repeats the last row if the rows don't divide evenly.

        The gather in `_joined` needs the same number of rows from every rank.
        """
        per_rank = -(-rows // self.cfg)
        start = self.mesh.get_local_rank("cfg") * per_rank
        return [min(row, rows - 1) for row in range(start, start + per_rank)]

    def _configured(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Pad text that has a mask to divide evenly, and choose diffusers' attention variant.

        The config is read by diffusers' hooks during the forward, so it must be set for each call:
        whether tokens divide depends on the image's size and on the prompts of the batch.
        """
        plan = self.plan
        # Without named text and image the transformer pads its tokens to a multiple of `grain`.
        if plan.text is None or plan.image is None:
            divides = plan.grain % self.degree == 0
        else:
            if plan.mask is not None:
                arguments = _padded_text(arguments, plan.text, plan.mask, self.degree)
            tokens = [arguments[name].shape[1] for name in (plan.text, plan.image)]
            divides = not any(count % self.degree for count in tokens)
        # "anything" gathers shards of unequal size, which costs a collective for the sizes, so
        # it's on only if needed. diffusers has it for ring or Ulysses alone, not for both.
        anything = not (divides and self._heads_divide)
        self.config.ulysses_anything = anything and self.config.ring_degree == 1
        self.config.ring_anything = anything and self.config.ulysses_degree == 1
        return arguments

    def _joined(self, output: Any, like: Any, rows: int) -> Any:
        """All rows of the output, gathered from the cfg ranks; a list if the rows differ in size.

        `like` has one input per row, of the same shape as that row's output.
        """
        group = self.mesh.get_group("cfg")
        if isinstance(output, torch.Tensor):
            whole = output.new_empty(self.cfg * len(output), *output.shape[1:])
            dist.all_gather_into_tensor(whole, output.contiguous(), group=group)
            return whole[:rows]
        # Z-Image returns a list, with images of any size in one batch. The gather takes tensors of
        # one size, so each rank flattens its rows and pads them to the largest rank's total. Every
        # rank knows all sizes from the arguments, so no collective is needed to exchange them.
        per_rank = -(-rows // self.cfg)
        row_sizes = [like[min(row, rows - 1)].numel() for row in range(self.cfg * per_rank)]
        largest = max(sum(row_sizes[i : i + per_rank]) for i in range(0, len(row_sizes), per_rank))
        flat = torch.cat([row.flatten() for row in output])
        flat = pad(flat, (0, largest - len(flat)))
        whole = flat.new_empty(self.cfg * largest)
        dist.all_gather_into_tensor(whole, flat, group=group)
        whole = whole.view(self.cfg, largest)
        # A row starts after the same rank's rows before it.
        starts = [sum(row_sizes[row - row % per_rank : row]) for row in range(rows)]
        return [
            whole[row // per_rank, start : start + like[row].numel()].view(like[row].shape)
            for row, start in enumerate(starts)
        ]


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """No gradients, but no inference mode, in which DTensor would plan every call again."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _mesh(model: Model, group: Group) -> DeviceMesh:
    names = ("cfg", "tensor") if model.tensor > 1 else ("cfg", "ring", "ulysses")
    shape = tuple(getattr(model, name) for name in names)
    return init_device_mesh(group.device.type, shape, mesh_dim_names=names)


def _padded_text(arguments: dict[str, Any], text: str, mask: str, degree: int) -> dict[str, Any]:
    """The text [rows, tokens, d] padded to a multiple of `degree` tokens, with its mask."""
    embeds = arguments[text]
    missing = -embeds.shape[1] % degree
    if not missing:
        return arguments
    counts = arguments.get(mask)
    if counts is None:
        counts = embeds.new_ones(embeds.shape[:2], dtype=torch.bool)
    return arguments | {
        text: pad(embeds, (0, 0, 0, missing)),
        mask: pad(counts, (0, missing), value=False),
    }


def _leave_whole(transformer: Any, plan: ParallelPlan) -> None:
    for name in plan.whole:
        for module in getattr(transformer, name).modules():
            if hasattr(getattr(module, "processor", None), "_parallel_config"):
                module.processor._parallel_config = None
