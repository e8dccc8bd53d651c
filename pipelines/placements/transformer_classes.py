"""What groups of ranks need to know about each transformer class: one row per class.

A row says how a forward pass over several ranks divides the arguments, the blocks and the weights.
A class without a row is served by `replica` and `split` only. Doesn't know about ranks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import FluxTransformer2DModel
from diffusers.hooks.tensor_parallel import PackedRowwiseParallel
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF

from jobs.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """How a forward pass of one transformer class can be split.

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


@dataclass(frozen=True, slots=True)
class Chain:
    """The blocks of a transformer class that run in sequence, each on the previous one's output.

    `lists` maps each list of blocks, in the order of the forward pass, to the arguments that carry
    the state; all other arguments are computed outside the blocks, identically on every rank.
    `first` names lists that aren't part of the sequence; they stay with the first stage.
    """

    lists: Mapping[str, tuple[str, ...]]
    first: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TransformerClass:
    """One row: what each kind of group needs, or None if the class can't be served by it.

    `parallel` is for context_parallel. `chain` is for pipelined; its forward pass must need neither
    a block's index nor the number of blocks (as Chroma's modulation and skip connections do),
    because blocks are removed. `tensor` maps layers to how their weights split, for classes without
    a plan in diffusers. `masks` says whether it calls attention with a mask, which ring attention
    must send along.
    """

    parallel: ParallelPlan | None = None
    chain: Chain | None = None
    tensor: Mapping[str, Any] | None = None
    masks: bool = False


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


_CHROMA_TENSOR = {
    # Its blocks are named like Flux's. The last layer of a single block reads the outputs of its
    # attention and its feed-forward layer, which are 1 and 4 times as wide as a token.
    **FluxTransformer2DModel._tp_plan,
    "single_transformer_blocks.*.proj_out": PackedRowwiseParallel([1, 4]),
}
_Z_IMAGE_TENSOR = {
    f"{blocks}.*.{name}": style
    for blocks in ("layers", "noise_refiner", "context_refiner")
    for name, style in {
        "attention.to_q": "colwise",
        "attention.to_k": "colwise",
        "attention.to_v": "colwise",
        "attention.to_out.0": "rowwise",
        "feed_forward.w1": "colwise",
        "feed_forward.w3": "colwise",
        "feed_forward.w2": "rowwise",
    }.items()
}
_BOTH = ("hidden_states", "encoder_hidden_states")
_ALONE = ("hidden_states",)

TRANSFORMERS: Mapping[str, TransformerClass] = {
    "ChromaTransformer2DModel": TransformerClass(
        ParallelPlan(
            rows=("hidden_states", "encoder_hidden_states", "timestep", "attention_mask"),
            unsplit="its attention mask scores pairs of tokens, and diffusers has no plan to split "
            "it",
        ),
        tensor=_CHROMA_TENSOR,
    ),
    "FluxTransformer2DModel": TransformerClass(
        ParallelPlan(
            rows=(
                "hidden_states",
                "encoder_hidden_states",
                "pooled_projections",
                "timestep",
                "guidance",
            )
        ),
        Chain({"transformer_blocks": _BOTH, "single_transformer_blocks": _BOTH}),
    ),
    "Flux2Transformer2DModel": TransformerClass(
        ParallelPlan(rows=("hidden_states", "encoder_hidden_states", "timestep", "guidance")),
        Chain({"transformer_blocks": _BOTH, "single_transformer_blocks": _ALONE}),
    ),
    "PixArtTransformer2DModel": TransformerClass(chain=Chain({"transformer_blocks": _ALONE})),
    "QwenImageTransformer2DModel": TransformerClass(
        ParallelPlan(
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
        Chain({"transformer_blocks": _BOTH}),
        masks=True,
    ),
    "SD3Transformer2DModel": TransformerClass(chain=Chain({"transformer_blocks": _BOTH})),
    "SanaTransformer2DModel": TransformerClass(chain=Chain({"transformer_blocks": _ALONE})),
    "ZImageTransformer2DModel": TransformerClass(
        ParallelPlan(
            rows=("x", "t", "cap_feats"),
            heads="n_heads",
            text=None,
            image=None,
            grain=SEQ_MULTI_OF,
            split=_z_image_split,
            whole=("noise_refiner", "context_refiner"),
        ),
        Chain({"layers": ("x",)}, first=("noise_refiner", "context_refiner")),
        tensor=_Z_IMAGE_TENSOR,
        masks=True,
    ),
}


def parallel_plan_of(name: str) -> ParallelPlan:
    """The class's plan for context parallelism. Raises ConfigurationError if there's none."""
    plans = {known: row.parallel for known, row in TRANSFORMERS.items() if row.parallel}
    if name not in plans:
        raise ConfigurationError(
            f"context_parallel: no plan to split {name}; there are plans for {', '.join(plans)}"
        )
    return plans[name]


def chain_of_class(name: str) -> Chain:
    """The class's chain of blocks. Raises ConfigurationError if it can't be cut into stages."""
    chains = {known: row.chain for known, row in TRANSFORMERS.items() if row.chain}
    if name not in chains:
        raise ConfigurationError(
            f"pipelined: can't cut {name} into stages; supported are {', '.join(chains)}"
        )
    return chains[name]


def tensor_plan_of(name: str) -> Mapping[str, Any] | None:
    """Our plan for splitting the class's weights; None if it has none."""
    row = TRANSFORMERS.get(name)
    return row.tensor if row else None
