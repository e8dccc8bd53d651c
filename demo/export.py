"""Assemble the trained modules into a FluxPipeline, and save it as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from demo.train_transformer import Model


def assemble(vae: Any, model: Model) -> Any:
    """A stock pipeline with the given modules."""
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=model.text.text_encoder,
        tokenizer=model.text.tokenizer,
        text_encoder_2=model.text.text_encoder_2,
        tokenizer_2=model.text.tokenizer_2,
        transformer=model.transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(vae: Any, model: Model, out: Path) -> int:
    """Write the folder with weights in float16; return its size in bytes."""
    vae.register_to_config(_name_or_path="")  # or the work folder's path is saved
    pipeline = assemble(vae, model)
    pipeline.to(torch.float16)
    pipeline.save_pretrained(out, safe_serialization=True)
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
