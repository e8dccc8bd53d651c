"""The patches for diffusers' parallelism, one at a time and without other processes."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from jobs.errors import ConfigurationError
from pipelines.attention import check_parallel
from pipelines.placements import diffusers_patches
from pipelines.placements.arguments import by_name, some_rows
from pipelines.placements.transformer_classes import parallel_plan_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def attention(query, key, value, **options):
    """Attention over [rows, tokens, heads, features], as in diffusers."""
    swapped = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(*swapped, **options).transpose(1, 2)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize("features", [16, 128])
def test_mask_in_the_keys_matches_a_real_mask(dtype, tolerance, features):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 12, 3, features).to(dtype) * 3 for _ in range(3))
    mask = torch.arange(12) < torch.tensor([[5], [12]])
    expected = attention(query, key, value, attn_mask=mask[:, None, None])
    wide_query, wide_key = diffusers_patches.with_mask(query, key, mask[:, None, None])
    wide_value = torch.nn.functional.pad(value, (0, diffusers_patches.EXTRA))
    actual = attention(wide_query, wide_key, wide_value, scale=features**-0.5)
    assert (actual[..., :features] - expected).abs().max() <= tolerance
    assert torch.equal(actual[..., features:], torch.zeros_like(actual[..., features:]))


def test_scores_of_masked_keys_are_finite_and_negligible():
    query, key, value = (torch.randn(1, 4, 2, 16) for _ in range(3))
    query, key = diffusers_patches.with_mask(query, key, torch.zeros(1, 4, dtype=torch.bool))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 4
    assert torch.isfinite(scores).all()
    assert scores.max() < -10_000
    assert torch.isfinite(attention(query, key, value.repeat(1, 1, 1, 2)[..., :24])).all()


def test_mask_must_be_bool():
    with pytest.raises(TypeError, match=r"torch\.float32"):
        diffusers_patches.with_mask(
            *(torch.randn(1, 4, 2, 16) for _ in range(2)), torch.zeros(1, 4)
        )


def test_attention_without_parallelism_is_unchanged():
    seen = []
    dispatch = diffusers_patches._masked(
        lambda *tensors, **options: seen.append((tensors, options))
    )
    tensors, mask = [object()] * 3, object()
    dispatch(*tensors, attn_mask=mask, parallel_config=None, scale=None)
    assert seen == [(tuple(tensors), {"attn_mask": mask, "parallel_config": None, "scale": None})]


def test_log_sum_exp_on_cpu():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 5, 3, 16) for _ in range(3))
    out, lse = diffusers_patches._with_lse(None)(None, query, key, value, return_lse=True)
    scores = torch.einsum("bqhd,bkhd->bqhk", query, key) / 4
    assert torch.allclose(lse, torch.logsumexp(scores, -1), atol=1e-5)
    assert torch.allclose(out, attention(query, key, value), atol=1e-6)


def test_on_cpu_restores_diffusers():
    from diffusers.hooks import tensor_parallel

    before = torch.accelerator.device_count, tensor_parallel._SUPPORTED_TP_DEVICES
    with pytest.raises(RuntimeError), diffusers_patches.on_cpu():
        raise RuntimeError
    assert (torch.accelerator.device_count, tensor_parallel._SUPPORTED_TP_DEVICES) == before


@pytest.mark.parametrize(
    ("backend", "ring", "device"),
    [(None, 1, CPU), (None, 2, CPU), (None, 1, CUDA), ("_native_cudnn", 2, CUDA)],
)
def test_supported_kernels_pass(backend, ring, device):
    check_parallel(backend, ring, True, device)


@pytest.mark.parametrize(
    ("backend", "ring", "device", "sentence"),
    [
        (None, 2, CUDA, "'native' doesn't return on cuda; in half precision, _native_cudnn, .* do"),
        ("xformers", 1, CUDA, "'xformers' can't split a sequence; .*flash"),
    ],
)
def test_unsupported_kernels_are_refused(backend, ring, device, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        check_parallel(backend, ring, True, device)


def test_rows_are_selected_from_tensors_and_lists_but_not_from_positions():
    class ZImageTransformer2DModel:
        def forward(self, x, t, cap_feats, return_dict=True):
            """Has the parameters of diffusers' own forward."""

    plan = parallel_plan_of("ZImageTransformer2DModel")
    arguments = by_name(
        ZImageTransformer2DModel(), (["a", "b"], torch.arange(2)), {"cap_feats": ["c", "d"]}
    )
    part = some_rows(plan, arguments | {"return_dict": False}, [1, 1])
    assert part.pop("t").tolist() == [1, 1]
    assert part == {"x": ["b", "b"], "cap_feats": ["d", "d"], "return_dict": False}
    ids = torch.zeros(2, 3)
    flux = {"hidden_states": torch.zeros(2, 2, 4), "img_ids": ids, "guidance": None}
    part = some_rows(parallel_plan_of("FluxTransformer2DModel"), flux, [0])
    assert part["hidden_states"].shape == (1, 2, 4)
    assert part["img_ids"] is ids and part["guidance"] is None
