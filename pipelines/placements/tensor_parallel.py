"""Tensor parallelism: every rank holds a slice of the transformer's weights, and reads no more.

diffusers splits Flux, Flux2 and QwenImage; the plans for Chroma and Z-Image are ours. Each rank
reads its slices from the checkpoint, so that a model too large for one device can be loaded at all.
Knows no group; ranks are a mesh's.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel, TensorParallelConfig
from diffusers.hooks.tensor_parallel import PackedRowwiseParallel, resolve_tp_shard_specs
from torch.distributed.device_mesh import DeviceMesh

from jobs.catalog import Model
from jobs.errors import ConfigurationError, ModelUnavailable
from pipelines.loading.checkpoint import Checkpoint
from pipelines.loading.transient import may_pass
from pipelines.placements import diffusers_patches

_Z_IMAGE_BLOCK = {
    "attention.to_q": "colwise",
    "attention.to_k": "colwise",
    "attention.to_v": "colwise",
    "attention.to_out.0": "rowwise",
    "feed_forward.w1": "colwise",
    "feed_forward.w3": "colwise",
    "feed_forward.w2": "rowwise",
}
_CHROMA = {
    # Its blocks have the names of Flux's. A single block's last layer reads its attention and its
    # feed-forward layer, 1 and 4 times as wide as a token.
    **FluxTransformer2DModel._tp_plan,
    "single_transformer_blocks.*.proj_out": PackedRowwiseParallel([1, 4]),
}
OWN_PLANS: dict[str, dict[str, Any]] = {
    "ChromaTransformer2DModel": _CHROMA,
    "ZImageTransformer2DModel": {
        f"{blocks}.*.{name}": style
        for blocks in ("layers", "noise_refiner", "context_refiner")
        for name, style in _Z_IMAGE_BLOCK.items()
    },
}
"""Transformer class -> how its weights split, where diffusers doesn't say."""


def plan_of(kind: Any) -> Mapping[str, Any] | None:
    """How a transformer class's weights split, None if nobody knows."""
    return getattr(kind, "_tp_plan", None) or OWN_PLANS.get(kind.__name__)


def check_tensor(degree: int, kind: Any, config: Mapping[str, Any], heads: int) -> None:
    """Refuse a transformer whose weights do not split. Raises ConfigurationError."""
    plan = plan_of(kind)
    if plan is None:
        raise ConfigurationError(
            f"tensor: there is no plan to split the weights of {kind.__name__}"
        )
    if heads % degree:
        raise ConfigurationError(f"tensor {degree} does not divide the {heads} heads")
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
    kind._tp_plan = plan_of(kind)  # which from_pretrained takes from the class
    config = _Here(tp_degree=model.tensor, mesh=mesh["tensor"])
    config.place = device
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
            f"model {model.name!r}: {folder} cannot be split: {error}", may_pass=may_pass(error)
        ) from error
    if kind.__name__ in OWN_PLANS:
        _count_heads(transformer, model.tensor)
    return transformer.to(device)


class _Here(TensorParallelConfig):  # type: ignore[misc]
    """Slices land on this rank's own device; diffusers would count devices from the rank."""

    place: torch.device

    def setup(self, rank: int, world_size: int, device: torch.device, mesh: DeviceMesh) -> None:
        """Called by diffusers when the mesh is known."""
        super().setup(rank, world_size, self.place, mesh)


def _count_heads(transformer: Any, degree: int) -> None:
    """Tell attention that divides its features by its heads how many heads are here."""
    for module in transformer.modules():
        if hasattr(module, "processor") and hasattr(module, "heads"):
            module.heads //= degree
