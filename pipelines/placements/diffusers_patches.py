"""Patches for diffusers' parallelism (0.42.1): support for CPUs, and correct masks.

On a machine without an accelerator, context parallelism divides by a device count of zero, ring
attention has no kernel that returns its log-sum-exp, tensor parallelism refuses the device, and
gloo can't gather shards of unequal size. Each patch checks the tensors' device, or only applies
within `on_cpu()`, so with an accelerator diffusers runs unchanged.

Masks are wrong under ring attention on any device: each rank silently applies the mask of its own
keys to the keys of all ranks. See `_masked`.

`install` replaces module globals of diffusers once per process; without a parallelised model they
behave as before. `transformer_classes` says which classes use masks.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from pipelines.placements.transformer_classes import TRANSFORMERS

EXTRA = 8
"""Features added to a head to carry a mask. Kernels require multiples of 8."""

WEIGHT = 256.0
"""The query's and the key's factor of a masked key's bias; each must fit float16. The bias is
-(256 x 256) / sqrt(head size), or -5793 for a head of 128. Its exp() is 0, but it's finite, as it
must be for a chunk whose keys are all masked."""


@functools.cache
def install() -> None:
    """Patch attention under context parallelism: for CPUs, and for masks on any device."""
    attention: Any = import_module("diffusers.models.attention_dispatch")
    attention._native_attention_forward_op = _with_lse(attention._native_attention_forward_op)
    hooks: Any = import_module("diffusers.hooks.context_parallel")
    hooks._all_gather_anything = _padded_gather(hooks._all_gather_anything)
    masking = [name for name, row in TRANSFORMERS.items() if row.masks]
    for name in masking:
        module: Any = import_module(getattr(import_module("diffusers"), name).__module__)
        module.dispatch_attention_fn = _masked(module.dispatch_attention_fn)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Let diffusers apply a parallel config on a machine without an accelerator."""
    if torch.accelerator.is_available():
        yield
        return
    accelerator: Any = torch.accelerator
    tensor_parallel: Any = import_module("diffusers.hooks.tensor_parallel")
    count, devices = accelerator.device_count, tensor_parallel._SUPPORTED_TP_DEVICES
    accelerator.device_count = lambda: 1
    tensor_parallel._SUPPORTED_TP_DEVICES = (*devices, "cpu")
    try:
        yield
    finally:
        accelerator.device_count, tensor_parallel._SUPPORTED_TP_DEVICES = count, devices


def _with_lse(stock: Callable[..., Any]) -> Callable[..., Any]:
    """diffusers' native forward, which on CPU also returns the log-sum-exp that a ring merges by.

    Shapes are [rows, tokens, heads, features], the log-sum-exp [rows, tokens, heads].
    """

    @functools.wraps(stock)
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        **options: Any,
    ) -> Any:
        arguments = (attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse)
        if not return_lse or query.device.type != "cpu" or attn_mask is not None:
            return stock(ctx, query, key, value, *arguments, **options)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, dropout_p, is_causal, scale=scale
        )
        return out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()

    return forward


def _padded_gather(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Gather shards of unequal size; over gloo, which needs equal ones, padded to the largest."""

    @functools.wraps(stock)
    def gather(tensor: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
        if tensor.device.type != "cpu":
            whole: torch.Tensor = stock(tensor, dim, group)
            return whole
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, torch.tensor([tensor.shape[dim]]), group=group)
        lengths = [int(size) for size in sizes]
        shard = tensor.movedim(dim, 0)
        missing = max(lengths) - len(shard)
        shard = torch.cat([shard, shard.new_zeros(missing, *shard.shape[1:])])
        shards = [torch.empty_like(shard) for _ in lengths]
        dist.all_gather(shards, shard, group=group)
        parts = [part[:length] for part, length in zip(shards, lengths, strict=True)]
        return torch.cat(parts).movedim(0, dim).contiguous()

    return gather


def _masked(stock: Callable[..., Any]) -> Callable[..., Any]:
    """diffusers' attention, with the keys' mask made part of the keys if these are sent around.

    Ring attention passes keys and values from rank to rank, but not their mask. So each head gets
    an extra feature: a constant in the queries and, in the keys, either 0 or a value that makes a
    masked key's product with any query hugely negative. That way the mask goes along with the keys,
    through rings, unequal shards and any kernel, and a rank whose keys are all masked has no weight
    when the ring merges. Equal Ulysses shards don't need it, because diffusers handles their masks
    correctly.
    """

    @functools.wraps(stock)
    def dispatch(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        config = getattr(options.get("parallel_config"), "context_parallel_config", None)
        travels = config is not None and (config.ring_degree > 1 or config.ulysses_anything)
        if attn_mask is None or not travels:
            result: torch.Tensor = stock(query, key, value, attn_mask=attn_mask, **options)
            return result
        features = query.shape[-1]
        options["scale"] = options.get("scale") or features**-0.5
        query, key = with_mask(query, key, attn_mask)
        out: torch.Tensor = stock(query, key, pad(value, (0, EXTRA)), attn_mask=None, **options)
        return out[..., :features]

    return dispatch


def with_mask(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [rows, tokens, heads, features + EXTRA] that contain the mask.

    `mask` is bool, [rows, keys] or [rows, 1, 1, keys], True where a key counts.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"unsupported mask dtype {mask.dtype}: expected torch.bool")
    bias = torch.where(mask.reshape(key.shape[0], key.shape[1], 1, 1), 0.0, -WEIGHT).to(key.dtype)
    rest = key.new_zeros(*key.shape[:-1], EXTRA - 1)
    key = torch.cat([key, bias.expand(*key.shape[:-1], 1), rest], dim=-1)
    constant = query.new_zeros(*query.shape[:-1], EXTRA)
    constant[..., 0] = WEIGHT
    return torch.cat([query, constant], dim=-1), key
