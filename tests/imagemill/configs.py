"""Model folders with configs but no weights: FLUX.1-dev, as in its checkpoint."""

import json
from pathlib import Path
from typing import Any

FLUX_DEV: dict[str, tuple[str, str, dict[str, Any]]] = {
    "text_encoder": (
        "transformers",
        "CLIPTextModel",
        {
            "model_type": "clip_text_model",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
            "vocab_size": 49408,
            "max_position_embeddings": 77,
        },
    ),
    "text_encoder_2": (
        "transformers",
        "T5EncoderModel",
        {
            "model_type": "t5",
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "vocab_size": 32128,
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": True,
            "tie_word_embeddings": False,
        },
    ),
    "transformer": (
        "diffusers",
        "FluxTransformer2DModel",
        {
            "_class_name": "FluxTransformer2DModel",
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
    ),
    "vae": (
        "diffusers",
        "AutoencoderKL",
        {
            "_class_name": "AutoencoderKL",
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 2,
            "latent_channels": 16,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    ),
}


def save_configs(folder: Path) -> Path:
    """FLUX.1-dev without weights, tokenizers and scheduler."""
    index: dict[str, Any] = {"_class_name": "FluxPipeline", "_diffusers_version": "0.30.0"}
    for name, (library, class_name, config) in FLUX_DEV.items():
        index[name] = [library, class_name]
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
