"""What sharding needs to know about each transformer: which arguments have rows, tokens, a mask.

diffusers has its own plans for splitting activations and weights; Z-Image's is ours. A transformer
that isn't listed here can't be served by a group. Doesn't know about ranks.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """How one transformer class can be split.

    `rows` names the forward arguments with one entry per row, as tensors or lists. `text` and
    `image` name those whose second dimension is tokens; they're None if the transformer pads its
    tokens itself, to a multiple of `grain`. `mask` is the argument that masks padded text. `heads`
    is the config key of the number of attention heads. `split` makes a plan for diffusers' context
    parallelism if the class has none, and `whole` names the blocks that the plan doesn't split.
    `unsplit` says why tokens can't be split over ranks at all; rows and weights still can.
    """

    rows: tuple[str, ...]
    heads: str = "num_attention_heads"
    text: str | None = "encoder_hidden_states"
    image: str | None = "hidden_states"
    mask: str | None = None
    grain: int = 1
    split: Callable[[Any], Mapping[str, Any]] | None = None
    whole: tuple[str, ...] = ()
    unsplit: str | None = None


def _z_image_split(transformer: Any) -> Mapping[str, Any]:
    """Split the main layers' one sequence of image and text; the refiners before them stay whole.

    The refiners are 4 of 34 layers, and their output is cut and joined row by row, which can't be
    done on shards. Every layer gets the whole mask and the whole rotary table.
    """
    last = len(transformer.layers) - 1
    along = ContextParallelInput(split_dim=1, expected_dims=3)
    return {
        "layers.0": {"x": along},
        "layers.*": {
            "attn_mask": ContextParallelInput(split_dim=1, expected_dims=2),
            "freqs_cis": along,
        },
        f"layers.{last}": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }


PLANS: dict[str, ParallelPlan] = {
    "ChromaTransformer2DModel": ParallelPlan(
        rows=("hidden_states", "encoder_hidden_states", "timestep", "attention_mask"),
        unsplit="its attention mask scores pairs of tokens, and diffusers has no plan to split it",
    ),
    "FluxTransformer2DModel": ParallelPlan(
        rows=(
            "hidden_states",
            "encoder_hidden_states",
            "pooled_projections",
            "timestep",
            "guidance",
        )
    ),
    "Flux2Transformer2DModel": ParallelPlan(
        rows=("hidden_states", "encoder_hidden_states", "timestep", "guidance")
    ),
    "QwenImageTransformer2DModel": ParallelPlan(
        rows=(
            "hidden_states",
            "encoder_hidden_states",
            "encoder_hidden_states_mask",
            "timestep",
            "guidance",
            "img_shapes",
        ),
        mask="encoder_hidden_states_mask",
    ),
    "ZImageTransformer2DModel": ParallelPlan(
        rows=("x", "t", "cap_feats"),
        heads="n_heads",
        text=None,
        image=None,
        grain=SEQ_MULTI_OF,
        split=_z_image_split,
        whole=("noise_refiner", "context_refiner"),
    ),
}
"""Transformer class -> its plan."""


def by_name(transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a forward call, by name."""
    return dict(zip(_names(transformer.__class__), args, strict=False)) | dict(kwargs)


def some_rows(
    plan: ParallelPlan, arguments: Mapping[str, Any], rows: Sequence[int]
) -> dict[str, Any]:
    """The arguments of a forward call over these rows only."""
    return {
        name: _select(value, rows) if name in plan.rows else value
        for name, value in arguments.items()
    }


def _select(value: Any, rows: Sequence[int]) -> Any:
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return value[list(rows)]
    return [value[row] for row in rows]


@cache
def _names(transformer: Any) -> tuple[str, ...]:
    """The parameters of a class's forward, without self."""
    return tuple(inspect.signature(transformer.forward).parameters)[1:]
