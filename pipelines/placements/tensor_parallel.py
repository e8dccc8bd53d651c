"""Tensor parallelism: every rank holds, and reads, only a slice of the transformer's weights.

diffusers has plans for some classes; `transformer_classes` has ours for others. Each rank reads
just its slices from the checkpoint, so a model too large for one device can be loaded. Doesn't know
about `Group`; ranks come from a device mesh.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import TensorParallelConfig
from diffusers.hooks.tensor_parallel import resolve_tp_shard_specs
from torch.distributed.device_mesh import DeviceMesh

from jobs.catalog import Model
from jobs.errors import ConfigurationError, ModelUnavailable
from pipelines.loading.checkpoint import Checkpoint
from pipelines.loading.transient import may_pass
from pipelines.placements import diffusers_patches
from pipelines.placements.transformer_classes import tensor_plan_of


def plan_of(kind: Any) -> Mapping[str, Any] | None:
    """How a transformer class's weights split; None if there's no plan."""
    return getattr(kind, "_tp_plan", None) or tensor_plan_of(kind.__name__)


def check_tensor(degree: int, kind: Any, config: Mapping[str, Any], heads: int) -> None:
    """Refuse a transformer whose weights can't be split. Raises ConfigurationError."""
    plan = plan_of(kind)
    if plan is None:
        raise ConfigurationError(f"tensor: no plan to split the weights of {kind.__name__}")
    if heads % degree:
        raise ConfigurationError(f"tensor {degree} doesn't divide the {heads} heads")
    with init_empty_weights():
        skeleton = kind.from_config(config)
    try:
        resolve_tp_shard_specs(skeleton, plan, degree)
    except ValueError as error:
        raise ConfigurationError(f"tensor {degree}: {error}") from error


def load_slices(
    model: Model, checkpoint: Checkpoint, kind: Any, mesh: DeviceMesh, device: torch.device
) -> Any:
    """This rank's slices of the transformer, on `device`; `mesh` has the dimension "tensor".

    Raises ModelUnavailable.
    """
    folder = checkpoint.source("transformer").weights
    kind._tp_plan = plan_of(kind)  # from_pretrained reads the plan from the class
    config = _OwnDevice(tp_degree=model.tensor, mesh=mesh["tensor"])
    config.own_device = device
    try:
        with diffusers_patches.on_cpu():
            transformer = kind.from_pretrained(
                folder,
                dtype=getattr(torch, model.dtype),
                variant=model.variant,
                parallel_config=config,
            )
    except (OSError, ValueError, KeyError) as error:
        raise ModelUnavailable(
            f"model {model.name!r}: couldn't load slices of {folder}: {error}",
            may_pass=may_pass(error),
        ) from error
    if tensor_plan_of(kind.__name__):
        _count_heads(transformer, model.tensor)
    return transformer.to(device)


class _OwnDevice(TensorParallelConfig):  # type: ignore[misc]
    """Puts slices on this rank's own device, where diffusers would use the rank as its index."""

    own_device: torch.device

    def setup(self, rank: int, world_size: int, device: torch.device, mesh: DeviceMesh) -> None:
        """Called by diffusers once the mesh is known."""
        super().setup(rank, world_size, self.own_device, mesh)


def _count_heads(transformer: Any, degree: int) -> None:
    """Set the local number of heads on attention modules that divide their features by it."""
    for module in transformer.modules():
        if hasattr(module, "processor") and hasattr(module, "heads"):
            module.heads //= degree
