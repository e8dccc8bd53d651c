"""Tiny pipelines of Flux and models derived from it."""

from typing import Any

import diffusers as d
import transformers as t

from tests.pipelines.tiny_parts import (
    WIDTH,
    chat_tokenizer,
    clip,
    clip_tokenizer,
    mistral,
    mistral_tokenizer,
    qwen3,
    t5,
    t5_tokenizer,
    vae,
)


def flow_shifted() -> Any:
    return d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def flux(guidance_embeds: bool) -> Any:
    transformer = d.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    return d.FluxPipeline(
        scheduler=flow_shifted(),
        vae=vae(4, 1.5035, 0.0609),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def chroma() -> Any:
    transformer = d.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=WIDTH,
        approximator_layers=2,
    )
    return d.ChromaPipeline(
        scheduler=flow_shifted(),
        vae=vae(4, 1.5035, 0.0609),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
    )


def _flux2_transformer(guidance_embeds: bool) -> Any:
    return d.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=48,
        timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=guidance_embeds,
    )


def _flux2_vae() -> Any:
    return d.AutoencoderKLFlux2(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def flux2() -> Any:
    return d.Flux2Pipeline(
        scheduler=flow_shifted(),
        vae=_flux2_vae(),
        # 31 layers, because the prompt is read at layers 10, 20 and 30.
        text_encoder=mistral(layers=31),
        tokenizer=mistral_tokenizer(),
        transformer=_flux2_transformer(guidance_embeds=True),
    )


def flux2_klein() -> Any:
    return d.Flux2KleinPipeline(
        scheduler=flow_shifted(),
        vae=_flux2_vae(),
        # 28 layers, because the prompt is read at layers 9, 18 and 27.
        text_encoder=qwen3(t.Qwen3ForCausalLM, layers=28),
        tokenizer=chat_tokenizer(),
        transformer=_flux2_transformer(guidance_embeds=False),
    )
