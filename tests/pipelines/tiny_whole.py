"""Tiny pipelines without a step-level family: they run as whole calls."""

from typing import Any

import diffusers as d
import torch
import transformers as t

from tests.pipelines.tiny import stir
from tests.pipelines.tiny_parts import WIDTH, t5_tokenizer, vae


def cogview4() -> Any:
    """Pads prompts on the left to the longest, without a mask."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    tokenizer.padding_side = "left"
    text_encoder = t.GlmModel(
        t.GlmConfig(
            hidden_size=WIDTH,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            vocab_size=98,
            pad_token_id=0,
            max_position_embeddings=4096,
        )
    )
    transformer = d.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=32,
        sample_size=16,
        rope_axes_dim=(16, 16),
    )
    pipe = d.CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae(4, 1.5035, 0.0609),
        transformer=transformer,
        scheduler=d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
    for module in (pipe.text_encoder, pipe.transformer, pipe.vae):
        stir(module.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe
