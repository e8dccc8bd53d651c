"""Tiny pipelines that make videos; the service requests one frame."""

from collections.abc import Callable
from typing import Any

import diffusers as d
import transformers as t

from tests.pipelines.classes.assemble import (
    ROPE,
    TEXT,
    assemble,
    ddim,
    flow,
)
from tests.pipelines.classes.transformers import COSMOS, CosmosChecker
from tests.pipelines.classes.unets import UNET, XL
from tests.pipelines.tiny_parts import WIDTH, chat_tokenizer, t5_tokenizer

WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": WIDTH,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


ANYFLOW: dict[str, Any] = {
    **{name: value for name, value in WAN.items() if name != "qk_norm"},
    "gate_value": 0.25,
    "deltatime_type": "r",
}


def motion(**options: Any) -> Any:
    return d.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=4,
        **options,
    )


def animatediff(name: str, **overrides: Any) -> Any:
    return assemble(
        getattr(d, name),
        unet=d.UNet2DConditionModel(**UNET),
        motion_adapter=motion(),
        scheduler=ddim(),
        **overrides,
    )


def animatediff_xl() -> Any:
    return assemble(
        d.AnimateDiffSDXLPipeline,
        unet=d.UNet2DConditionModel(**XL),
        motion_adapter=motion(use_motion_mid_block=False),
        scheduler=ddim(),
    )


def anyflow(name: str, **options: Any) -> Any:
    return assemble(
        getattr(d, name),
        tokenizer=t5_tokenizer(),
        transformer={**ANYFLOW, **options},
        scheduler=d.FlowMapEulerDiscreteScheduler(shift=5.0),
    )


def cogvideox() -> Any:
    return assemble(
        d.CogVideoXPipeline,
        transformer={
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 2,
            "text_embed_dim": WIDTH,
            "num_layers": 1,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": 226,
        },
        vae=d.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        scheduler=d.CogVideoXDDIMScheduler(),
    )


def cosmos() -> Any:
    return assemble(
        d.CosmosTextToWorldPipeline,
        transformer={**COSMOS, "in_channels": 4, "out_channels": 4},
        vae=d.AutoencoderKLCosmos(
            latent_channels=4,
            encoder_block_out_channels=(8, 8, 8, 8),
            decode_block_out_channels=(8, 8, 8, 8),
            attention_resolutions=(8,),
            resolution=64,
            num_layers=2,
            patch_size=4,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        ),
        scheduler=d.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, final_sigmas_type="sigma_min"),
        safety_checker=CosmosChecker(),
    )


def easyanimate() -> Any:
    text = {**TEXT, "rope_parameters": ROPE}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    config = t.Qwen2VLConfig(text_config=text, vision_config=vision)
    return assemble(
        d.EasyAnimatePipeline,
        transformer={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 2,
            "text_embed_dim": 16,
            "num_layers": 1,
            "sample_width": 16,
            "sample_height": 16,
            "patch_size": 2,
        },
        vae=d.AutoencoderKLMagvit(
            down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
            up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            spatial_group_norm=False,
        ),
        text_encoder=t.Qwen2VLForConditionalGeneration(config),
        tokenizer=chat_tokenizer(),
    )


def byt5() -> Any:
    return t.T5EncoderModel(
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


def hunyuan_15() -> Any:
    from diffusers.guiders import ClassifierFreeGuidance

    config = t.Qwen2_5_VLTextConfig(**TEXT, rope_parameters=ROPE)
    return assemble(
        d.HunyuanVideo15Pipeline,
        transformer={
            "in_channels": 9,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": WIDTH,
            "image_embed_dim": 12,
            "rope_axes_dim": (2, 2, 4),
            "target_size": 16,
            "task_type": "t2v",
        },
        vae=d.AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ),
        text_encoder=t.Qwen2_5_VLTextModel(config),
        tokenizer=chat_tokenizer(),
        text_encoder_2=byt5(),
        tokenizer_2=t.ByT5Tokenizer(),
        scheduler=flow(shift=7.0),
        guider=ClassifierFreeGuidance(guidance_scale=2.0),
    )


def hunyuan_vae(channels: int = 4) -> Any:
    return d.AutoencoderKLHunyuanVideo(
        latent_channels=channels,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )


def hunyuan_video() -> Any:
    config = t.LlamaConfig(**TEXT, max_position_embeddings=512)
    return assemble(
        d.HunyuanVideoPipeline,
        transformer={
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "patch_size_t": 1,
            "guidance_embeds": True,
            "text_embed_dim": 16,
            "pooled_projection_dim": WIDTH,
            "rope_axes_dim": (2, 4, 4),
        },
        vae=hunyuan_vae(),
        text_encoder=t.LlamaModel(config),
        tokenizer=chat_tokenizer(),
        scheduler=flow(shift=7.0),
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "AnimateDiffPAGPipeline": lambda: animatediff(
        "AnimateDiffPAGPipeline", pag_applied_layers=["mid"]
    ),
    "AnimateDiffPipeline": lambda: animatediff("AnimateDiffPipeline"),
    "AnimateDiffSDXLPipeline": animatediff_xl,
    "AnyFlowPipeline": lambda: anyflow("AnyFlowPipeline"),
    "CogVideoXPipeline": cogvideox,
    "CosmosTextToWorldPipeline": cosmos,
    "EasyAnimatePipeline": easyanimate,
    "HunyuanVideo15Pipeline": hunyuan_15,
    "HunyuanVideoPipeline": hunyuan_video,
}
