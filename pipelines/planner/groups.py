"""List the groups of ranks that could serve a model on some devices: context parallel or pipelined.

Each is checked with the same functions as the placement that would load it. Speeds are bounds from
counted bytes, not measurements.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.hooks.tensor_parallel import resolve_tp_shard_specs

from jobs.catalog import Model
from jobs.errors import ConfigurationError, ImageFailed
from jobs.request import ImageRequest
from pipelines.attention import CUDNN, check_parallel, takes_backends
from pipelines.loading.quantization import check_plain
from pipelines.placements.context_parallel import ROOM
from pipelines.placements.context_parallel_checks import SizeCheck, check_sequence
from pipelines.placements.stages import chain_of, split_points
from pipelines.placements.tensor_parallel import check_tensor, plan_of
from pipelines.placements.transformer_classes import (
    ParallelPlan,
    chain_of_class,
    parallel_plan_of,
)
from pipelines.planner.case import Case, Option, text, texts
from pipelines.planner.memory import in_words
from pipelines.planner.skeleton import DECODE, DENOISE, ENCODE, width_of


def context_parallel_options(case: Case) -> Iterator[Option]:
    """One option per way to split an image; those refused for the same reason are listed once."""
    if len(case.sizes) < 2:
        return
    try:
        plan = parallel_plan_of(case.kind)
    except ConfigurationError as error:
        yield Option("context_parallel", False, str(error))
        return
    reasons = set()
    for degrees in _ways(case):
        name = " x ".join(f"{part} {degree}" for part, degree in degrees.items())
        try:
            model = _with_kernel(case, case.model_for("context_parallel", **degrees))
            _check(case, plan, model)
        except (ConfigurationError, ImageFailed) as error:
            if str(error) not in reasons:
                yield Option(f"context_parallel, {name}", False, str(error))
            reasons.add(str(error))
        else:
            yield _shared(case, name, degrees, model)


def _ways(case: Case) -> Iterator[dict[str, int]]:
    """Degrees by their field names in an entry."""
    for count in case.degrees():
        yield {"ulysses": count}
        yield {"ring": count}
        for ring in range(2, count // 2 + 1):
            if count % ring == 0:
                yield {"ring": ring, "ulysses": count // ring}
        yield {"tensor": count}
        if case.image.rows == 2 and count == 2:
            yield {"cfg": 2}
        elif case.image.rows == 2 and count % 2 == 0:
            yield {"cfg": 2, "ulysses": count // 2}


def _with_kernel(case: Case, model: Model) -> Model:
    """Set a kernel whose parts a ring can merge, because torch's own choice on CUDA isn't one.

    An entry that sets a kernel, or whose denoiser can't run this one, is returned unchanged.
    """
    is_half = getattr(torch, model.dtype) in (torch.float16, torch.bfloat16)
    if model.ring == 1 or model.attention_backend or not is_half:
        return model
    return replace(model, attention_backend=CUDNN) if takes_backends(case.module) else model


def _check(case: Case, plan: ParallelPlan, model: Model) -> None:
    """Raise the error with which the leader would refuse the entry on CUDA devices."""
    check_plain(case.checkpoint, model.placement)
    config, split = case.module.config, model.ring * model.ulysses > 1
    check_parallel(model.attention_backend, model.ring, split, torch.device("cuda"))
    if model.tensor > 1:
        check_tensor(model.tensor, type(case.module), config, config[plan.heads])
    elif split:
        check_sequence(model, case.kind, plan, config[plan.heads])
    size: Any = _Size(case.image.tokens)
    defaults = model.defaults
    SizeCheck(model, plan, size)(
        ImageRequest(model.name, "", 0, defaults.width, defaults.height, defaults.steps, 0.0)
    )


class _Size:
    """Stands in for a loaded model in a size check: the tokens of an image of the default size."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def tokens(self, request: ImageRequest) -> int:
        """Tokens of the default size, whatever the request."""
        return self._tokens


def _shared(case: Case, name: str, degrees: Mapping[str, int], model: Model) -> Option:
    order = case.roomiest(model.ranks)
    rooms = [case.sizes[at] for at in order]
    weights = case.denoiser.size if model.tensor == 1 else _slice(case, model.tensor)
    share = case.peak[DENOISE] // (model.ring * model.ulysses * model.cfg)
    loaded = case.others + weights
    if model.tensor > 1 and case.denoiser.size <= ROOM * rooms[0]:
        loaded = case.total  # first loaded whole, to verify the group's results against it
    leader = loaded + max(share, case.peak[ENCODE], case.peak[DECODE])
    follower = weights + share
    arithmetic = (
        f"leader {in_words(loaded)} + {in_words(leader - loaded)} = {in_words(leader)}, "
        f"others {in_words(weights)} + {in_words(share)} = {in_words(follower)}; {case.has()}"
    )
    title = f"context_parallel, {name}"
    if leader > rooms[0] or follower > min(rooms):
        return Option(title, False, arithmetic)
    lines = [
        'placement = "context_parallel"',
        *(f"{part} = {degree}" for part, degree in degrees.items()),
        f"devices = {texts([case.names[at] for at in order])}",
    ]
    if model.attention_backend and not case.model.attention_backend:
        lines.append(f"attention_backend = {text(model.attention_backend)}")
    suffix = "-".join(f"{part}-{degree}" for part, degree in degrees.items())
    return Option(title, True, arithmetic, _speed(case, model, rooms), case.entry(suffix, lines))


def _slice(case: Case, degree: int) -> int:
    """Bytes of the denoiser on one rank of tensor parallelism: its slices plus the unsplit rest."""
    specs = resolve_tp_shard_specs(case.module, plan_of(type(case.module)), degree)
    split = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in case.module.named_parameters()
        if name in specs and specs[name].dim is not None
    )
    return int(case.denoiser.size - split + split // degree)


def _speed(case: Case, model: Model, rooms: list[int]) -> str:
    what = "guided image" if model.cfg > 1 else "image"
    bound = f"at most {model.ranks}x for one {what}"
    sent = _sent(case, model)
    speed = f"{bound}: each rank sends {in_words(sent)} per step" if sent else bound
    return speed + (
        f"; {model.ranks} replicas make more images per hour" if case.alone <= min(rooms) else ""
    )


def _sent(case: Case, model: Model) -> int:
    """Bytes that a rank sends inside the blocks of a forward pass for one image.

    Counted in activations, per block: Ulysses sends its part 4 times, except for the share that it
    keeps (arXiv:2309.14509, section 3.2). A ring passes its part's keys and values through all
    other ranks (arXiv:2310.01889). Tensor parallelism sums twice over all ranks (arXiv:1909.08053,
    section 3); by a ring of n, each sum sends 2 (n - 1) / n of the whole.
    """
    item = next(case.module.parameters()).element_size()
    tokens = case.image.tokens + case.image.text
    whole = case.image.rows / model.cfg * tokens * width_of(case.module.config) * item
    part = whole / (model.ring * model.ulysses)
    sent = 4 * part * (1 - 1 / model.ulysses) + 2 * part * (model.ring - 1)
    sent += 4 * whole * (1 - 1 / model.tensor)
    return int(sent * len(case.denoiser.blocks))


def pipelined_options(case: Case) -> Iterator[Option]:
    """One option per number of stages."""
    if len(case.sizes) < 2:
        return
    try:
        chain_of_class(case.kind)
        case.model_for("pipelined")
        check_plain(case.checkpoint, "pipelined")
    except ConfigurationError as error:
        yield Option("pipelined", False, str(error))
        return
    for stages in case.degrees():
        if stages <= len(chain_of(case.module)[1]):
            yield _stages(case, stages)


def cut(case: Case, stages: int) -> tuple[list[int], int]:
    """Cut the denoiser as loading does: bytes of each stage's blocks, and of everything else.

    Every rank holds everything else, except the lists that stay with the first stage. Those are
    counted in the first stage.
    """
    chain, blocks = chain_of(case.module)
    named = case.denoiser.blocks.items()
    first = sum(size for name, size in named if name.split(".")[0] in chain.first)
    sizes = [block.size for block in blocks]
    rest = case.denoiser.size - sum(sizes) - first
    head, *others = (sum(sizes[i] for i in own) for own in split_points(sizes, stages, first))
    return [first + head, *others], rest


def _stages(case: Case, stages: int) -> Option:
    shares, rest = cut(case, stages)
    leader = case.others + rest + shares[0] + max(case.peak.values())
    needs = [leader, *(rest + share + case.peak[DENOISE] for share in shares[1:])]
    order = case.roomiest(stages)
    arithmetic = f"ranks need {', '.join(map(in_words, needs))}; {case.has()}"
    name = f"pipelined, {stages} stages"
    if any(need > case.sizes[at] for need, at in zip(needs, order, strict=True)):
        return Option(name, False, arithmetic)
    bound = sum(shares) / max(shares)
    speed = f"at most {bound:.1f}x with {stages} batches in flight, 1x for a single image"
    lines = [
        'placement = "pipelined"',
        f"stages = {stages}",
        f"chunks = {stages}",
        f"devices = {texts([case.names[at] for at in order])}",
    ]
    return Option(name, True, arithmetic, speed, case.entry(f"pipelined-{stages}", lines))
