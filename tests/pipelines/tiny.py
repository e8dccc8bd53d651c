"""Tiny pipelines of twelve families with random weights, built offline as diffusers folders.

`save_tiny("Flux", folder)` writes one; loading it and a 4-step image take a fraction of a second.
They're real: diffusers' own classes, 8x VAEs (4x for Sana's autoencoder), tokenizers of single
bytes. Noise is added to every parameter, because layers initialized to zero would hide their input.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as d
import torch
import transformers as t

from tests.pipelines.tiny_flux import chroma, flow_shifted, flux, flux2, flux2_klein
from tests.pipelines.tiny_parts import (
    WIDTH,
    chat_tokenizer,
    clip,
    clip_tokenizer,
    qwen3,
    t5,
    t5_tokenizer,
    vae,
)


def save_tiny(name: str, folder: Path) -> Path:
    """Build the tiny pipeline of that name (see `BUILDERS`) and save it in `folder`."""
    torch.manual_seed(0)
    pipe = BUILDERS[name]()
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            stir(component)
    pipe.save_pretrained(folder)
    if name == "Flux2":
        _name_processor(folder)
    return folder


def load_tiny(folder: Path, **options: Any) -> Any:
    """Load a folder with diffusers' own pipeline. Replaces processors, which need torchvision."""
    if "PixtralProcessor" not in (folder / "model_index.json").read_text():
        return d.DiffusionPipeline.from_pretrained(folder, **options)
    pipe = d.DiffusionPipeline.from_pretrained(folder, tokenizer=None, **options)
    pipe.tokenizer = t.AutoTokenizer.from_pretrained(folder / "tokenizer")
    return pipe


def _name_processor(folder: Path) -> None:
    """List the tokenizer's processor in the index, as published folders do."""
    index = folder / "model_index.json"
    components = json.loads(index.read_text())
    components["tokenizer"] = ["transformers", "PixtralProcessor"]
    index.write_text(json.dumps(components))
    config = {"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2}
    (folder / "tokenizer" / "processor_config.json").write_text(json.dumps(config))


def stir(module: torch.nn.Module) -> None:
    """Add the same noise to every parameter each time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def _unet(**options: Any) -> Any:
    return d.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **options,
    )


def _sd15() -> Any:
    return d.StableDiffusionPipeline(
        vae=vae(4, 0.18215, quant=True),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=_unet(cross_attention_dim=WIDTH, attention_head_dim=4),
        scheduler=d.PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    unet = _unet(
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    return d.StableDiffusionXLPipeline(
        vae=vae(4, 0.13025, quant=True),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(t.CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=d.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    )


def _sd3() -> Any:
    transformer = d.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=WIDTH,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        qk_norm="rms_norm",
    )
    return d.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, 1.5035, 0.0609),
        text_encoder=clip(t.CLIPTextModelWithProjection, hidden=16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(t.CLIPTextModelWithProjection, hidden=16),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
    )


def _sana() -> Any:
    transformer = d.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    vae = d.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=[1, 1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    text_encoder = t.Gemma2Model(
        t.Gemma2Config(
            head_dim=16,
            hidden_size=8,
            intermediate_size=64,
            max_position_embeddings=8192,
            num_attention_heads=2,
            num_hidden_layers=1,
            num_key_value_heads=2,
            vocab_size=259,
        )
    )
    return d.SanaPipeline(
        tokenizer=chat_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=d.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _pixart() -> Any:
    transformer = d.PixArtTransformer2DModel(
        sample_size=32,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=WIDTH,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    return d.PixArtSigmaPipeline(
        transformer=transformer,
        vae=vae(4, 0.13025, quant=True),
        scheduler=d.DPMSolverMultistepScheduler(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


def _qwen_image() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": rope,
        "vocab_size": 259,
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
    }
    special = ("vision_end", "vision_start", "vision", "image", "video")
    config = t.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        hidden_size=16,
        vocab_size=259,
        **{f"{name}_token_id": 256 for name in special},
    )
    transformer = d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(4, 4, 8),
    )
    vae = d.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 1.0, 2.0],
    )
    return d.QwenImagePipeline(
        scheduler=flow_shifted(),
        vae=vae,
        text_encoder=t.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=chat_tokenizer(),
        transformer=transformer,
    )


def _z_image() -> Any:
    transformer = d.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=WIDTH,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    )
    return d.ZImagePipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, 1.5035, 0.0609),
        text_encoder=qwen3(t.Qwen3Model, layers=3),
        tokenizer=chat_tokenizer(),
        transformer=transformer,
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "Flux": lambda: flux(guidance_embeds=False),
    "FluxGuidance": lambda: flux(guidance_embeds=True),
    "SD15": _sd15,
    "SDXL": _sdxl,
    "SD3": _sd3,
    "Sana": _sana,
    "PixArtSigma": _pixart,
    "QwenImage": _qwen_image,
    "ZImage": _z_image,
    "Flux2": flux2,
    "Flux2Klein": flux2_klein,
    "Chroma": chroma,
}
