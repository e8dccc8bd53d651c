"""Build tiny pipelines from the annotations of their constructors.

`assemble(SomePipeline, unet={...})` reads each component's class, and builds the given ones from
their arguments and the others from `PARTS`, with random weights and noise on every parameter. So
components added in a new diffusers release are noticed.
"""

import inspect
import typing
from collections.abc import Callable
from typing import Any

import diffusers as d
import torch
import transformers as t

from tests.pipelines.tiny import stir
from tests.pipelines.tiny_parts import WIDTH, chat_tokenizer, clip, clip_tokenizer, t5_tokenizer
from tests.pipelines.tiny_parts import t5 as t5_encoder
from tests.pipelines.tiny_parts import vae as kl

LEFT_OUT = {"safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker"}
"""Components that every pipeline works without; safety checkers have their own tests."""

ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 259,
}
VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 16,
}


def flow(**options: Any) -> Any:
    return d.FlowMatchEulerDiscreteScheduler(**options)


def ddim() -> Any:
    return d.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def wan_vae(**options: Any) -> Any:
    return d.AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        **options,
    )


def qwen_vae() -> Any:
    return d.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 1.0, 2.0],
    )


def flux2_vae(channels: int = 4) -> Any:
    return d.AutoencoderKLFlux2(
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def movq() -> Any:
    return d.VQModel(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )


def umt5() -> Any:
    return t.UMT5EncoderModel(
        t.UMT5Config(vocab_size=98, d_model=WIDTH, d_kv=8, d_ff=40, num_layers=2, num_heads=4)
    )


def qwen25_vl(kind: Any = t.Qwen2_5_VLForConditionalGeneration) -> Any:
    special = ("vision_end", "vision_start", "vision", "image", "video")
    config = t.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config=VISION,
        hidden_size=16,
        vocab_size=259,
        **{f"{name}_token_id": 256 for name in special},
    )
    return kind(config)


def qwen3_vl(kind: Any = t.Qwen3VLForConditionalGeneration, **text: Any) -> Any:
    config = t.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": ROPE, **text},
        vision_config={**VISION, "deepstack_visual_indexes": [0, 1]},
        **{f"{name}_token_id": 256 for name in ("vision_end", "vision_start", "image", "video")},
    )
    return kind(config)


def gemma2() -> Any:
    return t.Gemma2Model(
        t.Gemma2Config(
            head_dim=16,
            hidden_size=8,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=1,
            num_key_value_heads=2,
            vocab_size=259,
        )
    )


def gemma() -> Any:
    config = {name: value for name, value in TEXT.items() if name != "hidden_size"}
    return t.GemmaModel(t.GemmaConfig(**config, hidden_size=8, head_dim=4))


def vision() -> Any:
    return t.CLIPVisionModelWithProjection(
        t.CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=16,
            projection_dim=WIDTH,
        )
    )


def image_processor() -> Any:
    return t.CLIPImageProcessor(size=32, crop_size=32)


def projected() -> Any:
    return clip(t.CLIPTextModelWithProjection)


PARTS: dict[str, Callable[[], Any]] = {
    "AutoencoderKL": lambda: kl(4, 0.18215, 0.1, quant=True),
    "AutoencoderKLFlux2": flux2_vae,
    "AutoencoderKLQwenImage": qwen_vae,
    "AutoencoderKLWan": wan_vae,
    "VQModel": movq,
    "CLIPImageProcessorPil": image_processor,
    "CLIPTextModel": clip,
    "CLIPTextModelWithProjection": projected,
    "CLIPTokenizer": clip_tokenizer,
    "CLIPVisionModelWithProjection": vision,
    "Gemma2PreTrainedModel": gemma2,
    "GemmaPreTrainedModel": gemma,
    "GemmaTokenizer": chat_tokenizer,
    "Qwen2Tokenizer": chat_tokenizer,
    "Qwen2_5_VLForConditionalGeneration": qwen25_vl,
    "Qwen3VLForConditionalGeneration": qwen3_vl,
    "T5EncoderModel": t5_encoder,
    "T5Tokenizer": t5_tokenizer,
    "UMT5EncoderModel": umt5,
    "DDIMScheduler": ddim,
    "KarrasDiffusionSchedulers": ddim,
    "DDPMScheduler": lambda: d.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "DPMSolverMultistepScheduler": d.DPMSolverMultistepScheduler,
    "FlowMatchEulerDiscreteScheduler": flow,
    "UniPCMultistepScheduler": lambda: d.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}
"""Class name of a component -> function that builds a tiny one."""


def assemble(pipeline: Any, **overrides: Any) -> Any:
    """Build the tiny pipeline.

    A component in `overrides` is used as is, or built with the annotated class if it's a dict of
    arguments. The others come from `PARTS`.
    """
    torch.manual_seed(0)
    components = {}
    for name, parameter in inspect.signature(pipeline.__init__).parameters.items():
        classes = _classes(parameter.annotation)
        known = next((c.__name__ for c in classes if c.__name__ in PARTS), None)
        if isinstance(overrides.get(name), dict):
            components[name] = classes[0](**overrides[name])
        elif name in overrides:
            components[name] = overrides[name]
        elif name in LEFT_OUT:
            components[name] = False if name == "requires_safety_checker" else None
        elif parameter.default is parameter.empty and name != "self":
            assert known, f"nothing builds {name} of {pipeline.__name__}: {parameter.annotation}"
            components[name] = PARTS[known]()
    pipe = pipeline(**components)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            stir(component.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _named(annotation: str) -> Any:
    """The class of a quoted annotation."""
    return next(
        (getattr(library, annotation) for library in (d, t) if hasattr(library, annotation)), None
    )


def _classes(annotation: Any) -> list[Any]:
    """An annotation's classes: itself, or the members of a union."""
    members = typing.get_args(annotation) or (annotation,)
    named = [_named(m) if isinstance(m, str) else m for m in members]
    return [m for m in named if isinstance(m, type) and m is not type(None)]
