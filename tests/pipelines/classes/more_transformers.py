"""Tiny pipelines around image transformers, from HunyuanDiT to Z-Image."""

from collections.abc import Callable
from typing import Any

import diffusers as d
import transformers as t

from tests.pipelines.classes.assemble import (
    TEXT,
    assemble,
    flow,
    gemma2,
    qwen3_vl,
)
from tests.pipelines.classes.transformers import FLUX
from tests.pipelines.tiny import BUILDERS as STEPPED
from tests.pipelines.tiny import save_tiny as save_tiny
from tests.pipelines.tiny_parts import (
    WIDTH,
    chat_tokenizer,
    qwen3,
    t5_tokenizer,
)
from tests.pipelines.tiny_parts import vae as kl

PIXART: dict[str, Any] = {
    "sample_size": 32,
    "num_layers": 1,
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_channels": WIDTH,
    "in_channels": 4,
    "cross_attention_dim": WIDTH,
    "out_channels": 8,
}


HUNYUAN_DIT: dict[str, Any] = {
    "sample_size": 16,
    "num_layers": 2,
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "in_channels": 4,
    "cross_attention_dim": WIDTH,
    "cross_attention_dim_t5": WIDTH,
    "pooled_projection_dim": 16,
    "hidden_size": 24,
    "activation_fn": "gelu-approximate",
}


SANA: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 4,
    "cross_attention_dim": 8,
    "caption_channels": 8,
    "sample_size": 32,
}


def dc_vae() -> Any:
    return STEPPED["Sana"]().vae


def bert_tokenizer() -> Any:
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    tokens += [f"##{letter}" for letter in letters]
    return t.BertTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, model_max_length=77
    )


def hunyuan_dit(name: str, **overrides: Any) -> Any:
    config = t.BertConfig(
        vocab_size=200,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
    )
    from tests.pipelines.tiny_parts import t5

    return assemble(
        getattr(d, name),
        transformer=HUNYUAN_DIT,
        text_encoder=t.BertModel(config),
        tokenizer=bert_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        **overrides,
    )


def hunyuan_image() -> Any:
    from diffusers.guiders import AdaptiveProjectedMixGuidance

    byt5 = t.T5EncoderModel(
        t.T5Config(
            vocab_size=384,
            d_model=WIDTH,
            d_kv=8,
            d_ff=40,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    return assemble(
        d.HunyuanImagePipeline,
        transformer={
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": (1, 1),
            "text_embed_dim": 16,
            "text_embed_2_dim": WIDTH,
            "rope_axes_dim": (4, 4),
        },
        vae=d.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32, 32, 32),
            layers_per_block=1,
            scaling_factor=0.476986,
            spatial_compression_ratio=8,
            sample_size=128,
        ),
        scheduler=flow(shift=7.0),
        text_encoder_2=byt5,
        tokenizer_2=t.ByT5Tokenizer(),
        guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2),
        ocr_guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=3),
    )


def krea2() -> Any:
    return assemble(
        d.Krea2Pipeline,
        transformer={
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        text_encoder=qwen3_vl(t.Qwen3VLModel),
        tokenizer=chat_tokenizer(),
        scheduler=flow(use_dynamic_shifting=True),
        text_encoder_select_layers=(0, 1, 2),
    )


def lumina() -> Any:
    return assemble(
        d.LuminaPipeline,
        transformer={
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 8,
            "num_layers": 2,
            "num_attention_heads": 1,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "learn_sigma": True,
            "qk_norm": True,
            "cross_attention_dim": 8,
        },
        tokenizer=t5_tokenizer(),  # an empty prompt also gives a token
    )


def lumina2() -> Any:
    return assemble(
        d.Lumina2Pipeline,
        transformer={
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 8,
            "num_layers": 2,
            "num_attention_heads": 1,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 2, 2),
            "cap_feat_dim": 8,
        },
        text_encoder=gemma2(),
        tokenizer=chat_tokenizer(),
    )


def omnigen() -> Any:
    return assemble(
        d.OmniGenPipeline,
        transformer={
            "hidden_size": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 32,
            "num_layers": 1,
            "in_channels": 4,
            "time_step_dim": 4,
            "vocab_size": 259,
            "pad_token_id": 256,
            "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]},
        },
        tokenizer=chat_tokenizer(),
        scheduler=flow(invert_sigmas=True, num_train_timesteps=1),
    )


def ovis() -> Any:
    config = t.Qwen3Config(
        **{**TEXT, "hidden_size": WIDTH}, head_dim=8, max_position_embeddings=512
    )
    return assemble(
        d.OvisImagePipeline,
        transformer={**FLUX, "out_channels": 16},
        text_encoder=t.Qwen3Model(config),
    )


def pixart(name: str, **overrides: Any) -> Any:
    return assemble(getattr(d, name), transformer=PIXART, **overrides)


def gemma_encoder() -> Any:
    config = t.T5GemmaModuleConfig(
        vocab_size=259,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=512,
        layer_types=["full_attention"],
        query_pre_attn_scalar=4,
        dropout_rate=0.0,
    )
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    return T5GemmaEncoder(config)


def short_tokenizer() -> Any:
    """A tokenizer that pads to few tokens."""
    tokenizer = chat_tokenizer()
    tokenizer.model_max_length = 64
    return tokenizer


def prx() -> Any:
    return assemble(
        d.PRXPipeline,
        transformer={
            "patch_size": 1,
            "in_channels": 4,
            "context_in_dim": 8,
            "hidden_size": 8,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 1,
            "axes_dim": [2, 2],
        },
        text_encoder=gemma_encoder(),
        tokenizer=short_tokenizer(),
        vae=kl(4, 1.0, 0.0),
    )


def prx_pixel() -> Any:
    return assemble(
        d.PRXPixelPipeline,
        transformer={
            "patch_size": 4,
            "in_channels": 3,
            "context_in_dim": 16,
            "hidden_size": 8,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 1,
            "axes_dim": [2, 2],
            "bottleneck_size": 8,
            "resolution_embeds": True,
        },
        text_encoder=qwen3(t.Qwen3Model, layers=2),
        tokenizer=chat_tokenizer(),
        prompt_max_tokens=16,
    )


def sana(name: str, transformer: dict[str, Any], **overrides: Any) -> Any:
    return assemble(getattr(d, name), transformer=transformer, vae=dc_vae(), **overrides)


def sd3_pag() -> Any:
    plain = STEPPED["SD3"]()
    return assemble(
        d.StableDiffusion3PAGPipeline, **plain.components, pag_applied_layers=["blocks.1"]
    )


def z_image_omni() -> Any:
    plain = STEPPED["ZImage"]()
    return assemble(d.ZImageOmniPipeline, **plain.components, siglip=None, siglip_processor=None)


BUILDERS: dict[str, Callable[[], Any]] = {
    "HunyuanDiTPAGPipeline": lambda: hunyuan_dit("HunyuanDiTPAGPipeline", pag_applied_layers=["1"]),
    "HunyuanDiTPipeline": lambda: hunyuan_dit("HunyuanDiTPipeline"),
    "HunyuanImagePipeline": hunyuan_image,
    "Krea2Pipeline": krea2,
    "Lumina2Pipeline": lumina2,
    "LuminaPipeline": lumina,
    "OmniGenPipeline": omnigen,
    "OvisImagePipeline": ovis,
    "PRXPipeline": prx,
    "PRXPixelPipeline": prx_pixel,
    "PixArtAlphaPipeline": lambda: pixart("PixArtAlphaPipeline"),
    "PixArtSigmaPAGPipeline": lambda: pixart(
        "PixArtSigmaPAGPipeline", pag_applied_layers=["blocks.0"]
    ),
    "SanaPAGPipeline": lambda: sana(
        "SanaPAGPipeline", SANA, pag_applied_layers=["transformer_blocks.0"]
    ),
    "SanaSprintPipeline": lambda: sana(
        "SanaSprintPipeline",
        {**SANA, "qk_norm": "rms_norm_across_heads", "guidance_embeds": True},
        scheduler=d.SCMScheduler(),
    ),
    "StableDiffusion3PAGPipeline": sd3_pag,
    "ZImageOmniPipeline": z_image_omni,
}
