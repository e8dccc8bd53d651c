"""Tiny pipelines that make videos, from LTX to Wan."""

from collections.abc import Callable
from typing import Any

import diffusers as d
import transformers as t

from tests.pipelines.classes.assemble import (
    assemble,
    flow,
    gemma2,
    wan_vae,
)
from tests.pipelines.classes.unets import UNET, XL
from tests.pipelines.classes.videos import WAN
from tests.pipelines.tiny_parts import WIDTH, chat_tokenizer, t5, t5_tokenizer


def ltx(name: str) -> Any:
    vae = d.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1, 1, 1, 1),
        patch_size=4,
    )
    return assemble(
        getattr(d, name),
        transformer={
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "cross_attention_dim": WIDTH,
            "num_layers": 1,
            "caption_channels": WIDTH,
        },
        vae=vae,
    )


def latte() -> Any:
    return assemble(
        d.LattePipeline,
        transformer={
            "sample_size": 8,
            "num_layers": 1,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 3,
            "caption_channels": WIDTH,
            "in_channels": 4,
            "cross_attention_dim": 24,
            "out_channels": 8,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
        },
    )


def mochi() -> Any:
    return assemble(
        d.MochiPipeline,
        transformer={
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 12,
            "text_embed_dim": WIDTH,
            "time_embed_dim": 4,
            "max_sequence_length": 256,
        },
        vae=d.AutoencoderKLMochi(
            latent_channels=12,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
    )


def motif() -> Any:
    from diffusers.guiders import AdaptiveProjectedGuidance
    from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Encoder

    text = t.T5Gemma2TextConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=259,
        max_position_embeddings=512,
        head_dim=16,
        num_key_value_heads=2,
        dropout_rate=0.0,
    )
    return assemble(
        d.MotifVideoPipeline,
        transformer={
            "in_channels": 33,
            "out_channels": 16,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 1,
            "mlp_ratio": 4.0,
            "patch_size": 1,
            "patch_size_t": 1,
            "qk_norm": "rms_norm",
            "text_embed_dim": 32,
            "rope_axes_dim": (4, 4, 4),
        },
        text_encoder=T5Gemma2Encoder(t.T5Gemma2EncoderConfig(text_config=text)),
        tokenizer=chat_tokenizer(),
        scheduler=flow(shift=7.0),
        guider=AdaptiveProjectedGuidance(),
        feature_extractor=None,
    )


def sana_video() -> Any:
    return assemble(
        d.SanaVideoPipeline,
        transformer={
            "in_channels": 16,
            "out_channels": 16,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 8,
            "sample_size": 8,
            "patch_size": (1, 2, 2),
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        },
        vae=wan_vae(),
        text_encoder=gemma2(),
    )


def skyreels(name: str) -> Any:
    return assemble(
        getattr(d, name),
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        transformer=WAN,
    )


def text_to_video() -> Any:
    unet = {**UNET, "block_out_channels": (8, 16)}
    unet |= {
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    }
    return assemble(d.TextToVideoSDPipeline, unet=unet)


def wan() -> Any:
    return assemble(
        d.WanPipeline,
        tokenizer=t5_tokenizer(),
        transformer=d.WanTransformer3DModel(**WAN),
        scheduler=flow(shift=7.0),
    )


def wan_vace() -> Any:
    return assemble(
        d.WanVACEPipeline,
        tokenizer=t5_tokenizer(),
        transformer=d.WanVACETransformer3DModel(
            **WAN | {"num_layers": 3}, vace_layers=[0, 2], vace_in_channels=96
        ),
        scheduler=flow(shift=7.0),
        transformer_2=None,
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "LTXConditionPipeline": lambda: ltx("LTXConditionPipeline"),
    "LTXPipeline": lambda: ltx("LTXPipeline"),
    "LattePipeline": latte,
    "MochiPipeline": mochi,
    "MotifVideoPipeline": motif,
    "SanaVideoPipeline": sana_video,
    "SkyReelsV2DiffusionForcingPipeline": lambda: skyreels("SkyReelsV2DiffusionForcingPipeline"),
    "SkyReelsV2Pipeline": lambda: skyreels("SkyReelsV2Pipeline"),
    "TextToVideoSDPipeline": text_to_video,
    "TextToVideoZeroPipeline": lambda: assemble(d.TextToVideoZeroPipeline, unet=UNET),
    "TextToVideoZeroSDXLPipeline": lambda: assemble(d.TextToVideoZeroSDXLPipeline, unet=XL),
    "WanPipeline": wan,
    "WanVACEPipeline": wan_vace,
}
