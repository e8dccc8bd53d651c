"""Context parallelism: one image sequence over a group of ranks, by diffusers' own attention.

A group has cfg x ring x ulysses ranks, or cfg x tensor. Ring and Ulysses split the tokens of a
forward pass (both: unified attention), tensor parallelism its weights, and cfg its rows: the
positive and the negative halves of guidance go to different ranks. Where tokens or heads do not
divide, diffusers' "anything" variants of ring and Ulysses serve; unified attention has none, and
refuses.

Every rank holds the transformer, or slices of it, and only rank 0 the rest of the model. What
would be wrong is refused at start or, where it depends on the image's size, when the image starts.
Before rank 0 serves, `verify` has compared the group with one device.
"""

from collections.abc import Iterator, Mapping
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
from jobs.request import ImageRequest
from pipelines.acceleration import run_once
from pipelines.attention import (
    backend_of,
    check_backend,
    check_parallel,
    choose_attention,
    set_backend,
)
from pipelines.families import make_family
from pipelines.loading.checkpoint import Checkpoint
from pipelines.loading.quantization import check_plain
from pipelines.out_of_memory import reports_out_of_memory
from pipelines.placements import diffusers_patches
from pipelines.placements.family_pipeline import FamilyPipeline
from pipelines.placements.group import Group, Handler, check_devices, check_world, follow, join
from pipelines.placements.leader import FORWARD, Lead, Led, leading
from pipelines.placements.plans import PLANS, Plan, by_name, some_rows
from pipelines.placements.tensor_parallel import check_tensor, load_slices
from pipelines.placements.verify import compare, record

SHARD = "shard"
"""The order to shard the transformer; its value is the attention backend."""

STEADY = "steady"
"""The order to expect collectives to end soon from now on."""

log = structlog.get_logger(__name__)


def load_context_parallel(model: Model, checkpoint: Checkpoint, device: str) -> Led:
    """Rank 0: join, load everything onto `device`, shard, verify.

    Raises ConfigurationError, ModelUnavailable, OutOfMemory, GroupLost.
    """
    plan = check_entry(model, checkpoint, device)
    group = join(model, device)
    with leading(group):
        return _load(model, checkpoint, plan, group)


def _load(model: Model, checkpoint: Checkpoint, plan: Plan, group: Group) -> Led:
    pipe = checkpoint.load(model)
    place = _place_whole(pipe, model, group.device)
    family = make_family(pipe, model.max_sequence_length)
    transformer, alone = pipe.transformer, FamilyPipeline(family)
    if place == group.device:
        trial = partial(run_once, alone, model)
        choose_attention(transformer, model.attention_backend, place, trial)
    backend = backend_of(transformer) or model.attention_backend
    check_parallel(backend, model.ring, model.ring * model.ulysses > 1, group.device)
    references = record(alone, model, place, group.device)
    check = SizeCheck(model, plan, alone)
    try:
        check(references.request)
    except ImageFailed as error:
        raise ConfigurationError(f"defaults: {error}") from error
    if model.tensor > 1:
        pipe.transformer = transformer = None  # each rank reads its slices; this makes room
    group.send(SHARD, backend)
    with group.together():
        share = sharded(model, checkpoint, transformer, group, backend)
    pipe.transformer = Lead(share.transformer, group, share)
    compare(references, pipe.transformer)
    group.send(STEADY)
    group.steady()
    log.info("verified group", model=model.name, ranks=group.size, backend=backend)
    return Led(family, group, check)


def _place_whole(pipe: Any, model: Model, device: torch.device) -> torch.device:
    """Put everything on the device; of tensor parallelism's transformer, what fits.

    Returns where the whole transformer is, which is "cpu" when it has to be split to fit at all.
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
"""How much of a device's free memory a whole transformer may take, beside encoders and images."""


def follow_context_parallel(model: Model, checkpoint: Checkpoint, device: str) -> "Following":
    """Rank above 0: join and load the transformer alone onto `device`. Raises as rank 0 does."""
    check_entry(model, checkpoint, device)
    group = join(model, device)
    transformer = None
    try:
        if model.tensor == 1:
            others = {name: None for name in checkpoint.components if name not in _FOLLOWER_HAS}
            pipe = checkpoint.load(model, **others)
            transformer = reports_out_of_memory(pipe.transformer.to)(group.device)
    except BaseException as error:
        group.lose(f"rank {group.rank} could not load the model: {error}")
        raise
    return Following(model, checkpoint, transformer, group)


_FOLLOWER_HAS = ("transformer", "scheduler")


class Following:
    """A rank above 0: its share of every forward pass that the leader announces."""

    def __init__(
        self, model: Model, checkpoint: Checkpoint, transformer: Any, group: Group
    ) -> None:
        self.model, self.checkpoint = model, checkpoint
        self.transformer, self.group = transformer, group
        self.share: Share | None = None

    def run(self) -> None:
        """Follow until the leader says stop. Raises GroupLost, or what the leader refuses with."""
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
    """This rank's share of a whole transformer, or of one to be read in slices; collective."""
    diffusers_patches.install()
    mesh = _mesh(model, group)
    if model.tensor > 1:
        kind = getattr(import_module("diffusers"), checkpoint.components["transformer"])
        transformer = load_slices(model, checkpoint, kind, mesh, group.device)
    if backend is not None:
        set_backend(transformer, backend)
    return Share(model, transformer, mesh)


class Share:
    """This rank's part of the forward passes, around its part of the transformer.

    Called with the transformer's arguments on every rank alike, it returns the whole output, as
    the tuple of `return_dict=False`.
    """

    def __init__(self, model: Model, transformer: Any, mesh: DeviceMesh) -> None:
        self.transformer, self.mesh = transformer, mesh
        self.plan = PLANS[type(transformer).__name__]
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
        """The group's forward pass; collective."""
        arguments = by_name(self.transformer, args, kwargs)
        rows = len(arguments[self.plan.rows[0]])
        mine = self._rows_here(rows)
        part = arguments if self.cfg == 1 else some_rows(self.plan, arguments, mine)
        if self.config is not None:
            part = self._fitted(part)
        with _plain_tensors() if self.slices else nullcontext():
            output = self.transformer(**part)[0]
        if self.cfg > 1:
            output = self._joined(output, arguments[self.plan.rows[0]], rows)
        return (output,)

    def _rows_here(self, rows: int) -> list[int]:
        """As many on every rank, in order; the last row again where they do not divide."""
        each = -(-rows // self.cfg)
        place = self.mesh.get_local_rank("cfg")
        return [min(row, rows - 1) for row in range(place * each, (place + 1) * each)]

    def _fitted(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments whose text divides if a mask allows; the config set for what does not."""
        plan = self.plan
        if plan.text is None or plan.image is None:
            divides = plan.grain % self.degree == 0
        else:
            if plan.mask is not None:
                arguments = _padded_text(arguments, plan.text, plan.mask, self.degree)
            tokens = [arguments[name].shape[1] for name in (plan.text, plan.image)]
            divides = not any(count % self.degree for count in tokens)
        anything = not (divides and self._heads_divide)
        self.config.ulysses_anything = anything and self.config.ring_degree == 1
        self.config.ring_anything = anything and self.config.ulysses_degree == 1
        return arguments

    def _joined(self, output: Any, like: Any, rows: int) -> Any:
        """All rows of the output, from the ranks that made them; a list where rows differ."""
        group = self.mesh.get_group("cfg")
        if isinstance(output, torch.Tensor):
            whole = output.new_empty(self.cfg * len(output), *output.shape[1:])
            dist.all_gather_into_tensor(whole, output.contiguous(), group=group)
            return whole[:rows]
        each = -(-rows // self.cfg)
        row_sizes = [like[min(row, rows - 1)].numel() for row in range(self.cfg * each)]
        largest = max(sum(row_sizes[i : i + each]) for i in range(0, len(row_sizes), each))
        flat = torch.cat([row.flatten() for row in output])
        flat = pad(flat, (0, largest - len(flat)))
        whole = flat.new_empty(self.cfg * largest)
        dist.all_gather_into_tensor(whole, flat, group=group)
        whole = whole.view(self.cfg, largest)
        places = [(row // each, sum(row_sizes[row - row % each : row])) for row in range(rows)]
        return [
            whole[part, start : start + like[row].numel()].view(like[row].shape)
            for row, (part, start) in enumerate(places)
        ]


class SizeCheck:
    """Refuses images whose tokens the group cannot split rightly."""

    def __init__(self, model: Model, plan: Plan, placed: FamilyPipeline) -> None:
        self.placed, self.plan = placed, plan
        self.degree = model.ring * model.ulysses
        self.unified = model.ring > 1 and model.ulysses > 1
        self.name = f"ring {model.ring} x ulysses {model.ulysses}"

    def __call__(self, request: ImageRequest) -> None:
        """Raise ImageFailed for such an image."""
        if self.plan.image is None:
            return
        tokens = self.placed.tokens(request)
        size = f"{request.width}x{request.height} is {tokens} tokens"
        if self.unified and tokens % self.degree:
            raise ImageFailed(f"{size}, which {self.name} (unified attention) cannot split evenly")
        if tokens < self.degree:
            raise ImageFailed(f"{size}, fewer than the {self.degree} ranks of {self.name}")


def check_entry(model: Model, checkpoint: Checkpoint, device: str) -> Plan:
    """What can be known before anything is loaded or joined; the same verdict on every rank.

    Raises ConfigurationError.
    """
    check_world(model)
    check_devices(torch.device(device))
    name = checkpoint.components.get("transformer", checkpoint.class_name)
    if name not in PLANS:
        raise ConfigurationError(
            f"context_parallel: there is no plan to split {name}; there is for {', '.join(PLANS)}"
        )
    plan = PLANS[name]
    check_extras(model, checkpoint)
    if model.attention_backend is not None:
        check_backend(model.attention_backend)
        split = model.ring * model.ulysses > 1
        check_parallel(model.attention_backend, model.ring, split, torch.device(device))
    transformer: Any = getattr(import_module("diffusers"), name)
    config: Mapping[str, Any] = transformer.load_config(checkpoint.source("transformer").config)
    if model.tensor > 1:
        check_tensor(model.tensor, transformer, config, config[plan.heads])
    elif model.ring * model.ulysses > 1:
        if plan.unsplit:
            raise ConfigurationError(
                f"ring and ulysses can't split {name}: {plan.unsplit}; cfg and tensor can"
            )
        check_sequence(model, plan, config[plan.heads])
    return plan


def check_extras(model: Model, checkpoint: Checkpoint) -> None:
    """Refuse what a group can't serve. Raises ConfigurationError."""
    check_plain(model, checkpoint, "context_parallel")
    if model.cache is not None:
        raise ConfigurationError(
            f"cache {model.cache!r} cannot go with context_parallel: each rank would decide for "
            "itself which blocks to skip, and the others would wait for it for ever"
        )
    for name in ("compile", "cuda_graphs"):
        if getattr(model, name):
            raise ConfigurationError(f"{name} is not served together with context_parallel")
    if model.tensor > 1 and model.ring * model.ulysses > 1:
        raise ConfigurationError(
            "tensor cannot go with ring or ulysses: diffusers splits a model's weights or its "
            "sequence, not both"
        )


def check_sequence(model: Model, plan: Plan, heads: int) -> None:
    """Raise ConfigurationError where the degrees do not fit so many heads or the model's plan."""
    degree, ulysses = model.ring * model.ulysses, model.ulysses
    unified = model.ring > 1 and ulysses > 1
    if heads % ulysses:
        missing = -heads % ulysses
        if unified:
            raise ConfigurationError(
                f"unified: ulysses {ulysses} does not divide the {heads} heads"
            )
        if missing >= (heads + missing) // ulysses:
            raise ConfigurationError(
                f"ulysses {ulysses} leaves a rank without any of {heads} heads"
            )
    if unified and plan.text is None and plan.grain % degree:
        raise ConfigurationError(
            f"unified: ring {model.ring} x ulysses {ulysses} does not divide the {plan.grain} "
            "tokens by which the transformer pads"
        )
    length = model.max_sequence_length or 512
    if plan.text is not None and plan.mask is None:
        if unified and length % degree:
            raise ConfigurationError(
                f"unified: ring {model.ring} x ulysses {ulysses} does not divide the "
                f"{length} tokens of a prompt; max_sequence_length can say otherwise"
            )
        if length < degree:
            raise ConfigurationError(f"max_sequence_length {length} is less than {degree} ranks")


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """No gradients, but not inference mode, in which a DTensor thinks anew about every linear."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _mesh(model: Model, group: Group) -> DeviceMesh:
    names = ("cfg", "tensor") if model.tensor > 1 else ("cfg", "ring", "ulysses")
    shape = tuple(getattr(model, name) for name in names)
    return init_device_mesh(group.device.type, shape, mesh_dim_names=names)


def _padded_text(arguments: dict[str, Any], text: str, mask: str, degree: int) -> dict[str, Any]:
    """The text [rows, tokens, d] padded to a multiple of `degree` tokens, under its mask."""
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


def _leave_whole(transformer: Any, plan: Plan) -> None:
    for name in plan.whole:
        for module in getattr(transformer, name).modules():
            if hasattr(getattr(module, "processor", None), "_parallel_config"):
                module.processor._parallel_config = None
