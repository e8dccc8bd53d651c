"""Tiny pipelines around image transformers."""

from collections.abc import Callable
from typing import Any

import diffusers as d
import transformers as t

from tests.pipelines.classes.assemble import (
    TEXT,
    assemble,
    flow,
    projected,
    qwen3_vl,
    wan_vae,
)
from tests.pipelines.tiny import save_tiny
from tests.pipelines.tiny_parts import (
    WIDTH,
    chat_tokenizer,
    qwen3,
)
from tests.pipelines.tiny_parts import vae as kl
from tests.pipelines.tiny_whole import cogview4

FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (4, 4, 8),
}


def stepped(name: str) -> Any:
    """A pipeline with a step-level family, called whole here."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        pipe = d.DiffusionPipeline.from_pretrained(save_tiny(name, Path(folder) / name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def aura_flow() -> Any:
    return assemble(
        d.AuraFlowPipeline,
        transformer={
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": WIDTH,
            "joint_attention_dim": WIDTH,
            "pos_embed_max_size": 256,
        },
    )


def bria() -> Any:
    return assemble(
        d.BriaPipeline,
        transformer={**FLUX, "attention_head_dim": 8, "axes_dims_rope": (0, 4, 4)},
        vae=kl(4, 0.13025, 0.0, quant=True),
    )


def bria_fibo() -> Any:
    # An empty prompt is its own token, 128000.
    text = {**TEXT, "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 128_001}
    config = t.SmolLM3Config(**text, pad_token_id=256)
    return assemble(
        d.BriaFiboPipeline,
        transformer={
            **FLUX,
            "attention_head_dim": 8,
            "axes_dims_rope": (0, 4, 4),
            "joint_attention_dim": 64,
            "text_encoder_dim": 32,
        },
        vae=wan_vae(in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16),
        text_encoder=t.SmolLM3ForCausalLM(config),
        tokenizer=chat_tokenizer(),
    )


def chroma() -> Any:
    return assemble(
        d.ChromaPipeline,
        transformer={
            **FLUX,
            "approximator_hidden_dim": 32,
            "approximator_layers": 1,
            "approximator_num_channels": 16,
        },
    )


def cogview3() -> Any:
    return assemble(
        d.CogView3PlusPipeline,
        transformer={
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "out_channels": 4,
            "text_embed_dim": WIDTH,
            "time_embed_dim": 8,
            "condition_dim": 2,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        scheduler=d.CogVideoXDDIMScheduler(),
    )


def flux2(name: str, **overrides: Any) -> Any:
    return assemble(
        getattr(d, name),
        transformer={
            **FLUX,
            "joint_attention_dim": 48,
            "timestep_guidance_channels": 256,
            "axes_dims_rope": (4, 4, 4, 4),
            "guidance_embeds": False,
        },
        text_encoder=qwen3(t.Qwen3ForCausalLM, layers=28),
        scheduler=flow(use_dynamic_shifting=True),
        **overrides,
    )


def flux_kontext() -> Any:
    return assemble(
        d.FluxKontextPipeline,
        transformer={**FLUX, "pooled_projection_dim": WIDTH, "guidance_embeds": True},
        scheduler=flow(use_dynamic_shifting=True),
    )


def long_clip() -> Any:
    """HiDream's CLIP, which reads 128 tokens."""
    config = projected().config
    config.max_position_embeddings = 128
    return t.CLIPTextModelWithProjection(config)


def hidream() -> Any:
    """Any size is changed to one with the default's area, which is 64x64 here."""
    config = t.LlamaConfig(**{**TEXT, "num_hidden_layers": 2}, max_position_embeddings=512)
    pipe = assemble(
        d.HiDreamImagePipeline,
        transformer={
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_channels": [WIDTH, 16],
            "text_emb_dim": 2 * WIDTH,
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (32, 32),
            "llama_layers": (0, 1),
        },
        text_encoder=long_clip(),
        text_encoder_2=long_clip(),
        text_encoder_4=t.LlamaForCausalLM(config),
        tokenizer_4=chat_tokenizer(),
    )
    pipe.default_sample_size = 8
    return pipe


def cosmos2() -> Any:
    return assemble(
        d.Cosmos2TextToImagePipeline,
        transformer={**COSMOS, "in_channels": 16, "out_channels": 16},
        vae=wan_vae(),
        scheduler=flow(use_karras_sigmas=True),
        safety_checker=CosmosChecker(),
    )


COSMOS: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": WIDTH,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
    "patch_size": (1, 2, 2),
    "rope_scale": (2.0, 1.0, 1.0),
    "concat_padding_mask": True,
    "extra_pos_embed_type": "learnable",
}


class CosmosChecker:
    """Replaces Cosmos's guardrail, which needs its own package and models; accepts everything."""

    def to(self, *_: Any) -> "CosmosChecker":
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def ernie() -> Any:
    pixtral = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "image_size": 30,
        "patch_size": 6,
    }
    mistral = {"model_type": "mistral", **TEXT, "max_position_embeddings": 512, "head_dim": 8}
    config = t.Mistral3Config(text_config=mistral, vision_config=pixtral)
    return assemble(
        d.ErnieImagePipeline,
        transformer={
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 1,
            "ffn_hidden_size": 32,
            "in_channels": 16,
            "out_channels": 16,
            "text_in_dim": 16,
            "rope_axes_dim": (4, 4, 8),
        },
        text_encoder=t.Mistral3Model(config),
        tokenizer=chat_tokenizer(),
    )


def ideogram() -> Any:
    """Its prompt is read at 13 of 36 layers."""
    transformer = {
        "in_channels": 16,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "adaln_dim": 16,
        "llm_features_dim": 13 * 16,
        "mrope_section": (4, 2, 2),
    }
    return assemble(
        d.Ideogram4Pipeline,
        transformer=transformer,
        unconditional_transformer=transformer,
        text_encoder=qwen3_vl(t.Qwen3VLModel, num_hidden_layers=36),
        tokenizer=chat_tokenizer(),
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "AuraFlowPipeline": aura_flow,
    "BriaFiboPipeline": bria_fibo,
    "BriaPipeline": bria,
    "ChromaPipeline": chroma,
    "CogView3PlusPipeline": cogview3,
    "CogView4Pipeline": cogview4,
    "Cosmos2TextToImagePipeline": cosmos2,
    "ErnieImagePipeline": ernie,
    "Flux2KleinKVPipeline": lambda: flux2("Flux2KleinKVPipeline"),
    "Flux2KleinPipeline": lambda: stepped("Flux2Klein"),
    "FluxKontextPipeline": flux_kontext,
    "Ideogram4Pipeline": ideogram,
    "FluxPipeline": lambda: stepped("FluxGuidance"),
    "HiDreamImagePipeline": hidream,
    "PixArtSigmaPipeline": lambda: stepped("PixArtSigma"),
    "QwenImagePipeline": lambda: stepped("QwenImage"),
    "SanaPipeline": lambda: stepped("Sana"),
    "StableDiffusion3Pipeline": lambda: stepped("SD3"),
    "ZImagePipeline": lambda: stepped("ZImage"),
}
