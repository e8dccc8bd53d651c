"""Tiny pipelines with UNets: Stable Diffusion and its relatives, Kandinsky, IF, Cascade."""

from collections.abc import Callable
from typing import Any

import diffusers as d
import transformers as t
from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import (
    RobertaSeriesConfig,
    RobertaSeriesModelWithTransformation,
)

from tests.pipelines.classes.assemble import assemble, ddim
from tests.pipelines.tiny_parts import WIDTH, clip_tokenizer
from tests.pipelines.tiny_parts import vae as kl

UNET: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
}
XL: dict[str, Any] = {
    **UNET,
    "cross_attention_dim": 2 * WIDTH,
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 1),
    "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
}
SIMPLE: dict[str, Any] = {
    **UNET,
    "out_channels": 8,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "encoder_hid_dim": WIDTH,
    "resnet_time_scale_shift": "scale_shift",
}
"""The blocks of Kandinsky 2 and IF, which also predict variance."""


def stable(name: str, **overrides: Any) -> Any:
    return assemble(getattr(d, name), **{"unet": UNET, **overrides})


def karras() -> Any:
    return d.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012)


def prior() -> Any:
    return d.PriorTransformer(
        num_attention_heads=2, attention_head_dim=12, embedding_dim=WIDTH, num_layers=1
    )


def unclip_scheduler() -> Any:
    return d.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
    )


def if_() -> Any:
    unet = {**SIMPLE, "in_channels": 3, "out_channels": 6, "encoder_hid_dim_type": "text_proj"}
    return assemble(
        d.IFPipeline,
        unet=unet,
        scheduler=d.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True
        ),
        watermarker=None,
    )


def kandinsky_3() -> Any:
    return assemble(
        d.Kandinsky3Pipeline,
        unet={
            "in_channels": 4,
            "time_embedding_dim": 4,
            "groups": 2,
            "attention_head_dim": 4,
            "layers_per_block": 3,
            "block_out_channels": (8, 16),
            "cross_attention_dim": 4,
            "encoder_hid_dim": WIDTH,
        },
    )


def kandinsky_22() -> Any:
    unet = {**SIMPLE, "addition_embed_type": "image", "encoder_hid_dim_type": "image_proj"}
    return assemble(
        d.KandinskyV22CombinedPipeline,
        unet=unet,
        scheduler=ddim(),
        prior_prior=prior(),
        prior_scheduler=unclip_scheduler(),
    )


def kandinsky() -> Any:
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    config = MCLIPConfig(
        numDims=WIDTH,
        transformerDimensions=WIDTH,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=200,
    )
    unet = {
        **SIMPLE,
        "addition_embed_type": "text_image",
        "encoder_hid_dim_type": "text_image_proj",
    }
    return assemble(
        d.KandinskyCombinedPipeline,
        unet=unet,
        text_encoder=MultilingualCLIP(config),
        tokenizer=roberta_tokenizer(),
        scheduler=ddim(),
        prior_prior=prior(),
        prior_scheduler=unclip_scheduler(),
    )


def roberta_tokenizer() -> Any:
    vocab = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocab += [(chr(code), -3.0) for code in range(33, 127)]
    return t.XLMRobertaTokenizer(vocab=vocab, model_max_length=77)


def alt_diffusion() -> Any:
    config = RobertaSeriesConfig(
        hidden_size=WIDTH,
        project_dim=WIDTH,
        intermediate_size=40,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=200,
        pad_token_id=1,
    )
    return stable(
        "AltDiffusionPipeline",
        text_encoder=RobertaSeriesModelWithTransformation(config),
        tokenizer=roberta_tokenizer(),
    )


def stable_unclip() -> Any:
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    return assemble(
        d.StableUnCLIPPipeline,
        prior=prior(),
        prior_scheduler=d.DDPMScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        image_noising_scheduler=d.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        unet={
            **UNET,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 2 * WIDTH,
        },
    )


def latent_diffusion() -> Any:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
        LDMBertConfig,
        LDMBertModel,
    )

    config = LDMBertConfig(
        vocab_size=514,
        d_model=WIDTH,
        encoder_layers=2,
        encoder_ffn_dim=40,
        encoder_attention_heads=4,
        head_dim=8,
        max_position_embeddings=77,
    )
    return assemble(
        d.LDMTextToImagePipeline,
        vqvae=kl(4, 0.18215, quant=True),
        bert=LDMBertModel(config),
        tokenizer=clip_tokenizer(),
        unet=d.UNet2DConditionModel(**UNET),
    )


def amused() -> Any:
    transformer = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "cond_embed_dim": WIDTH,
        "encoder_hidden_size": WIDTH,
        "num_attention_heads": 1,
        "codebook_size": 32,
        "vocab_size": 33,
        "in_channels": 8,
        "block_out_channels": 8,
        "block_num_heads": 1,
        "micro_cond_encode_dim": 2,
        "micro_cond_embed_dim": 10,
    }
    vqvae = d.VQModel(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=4,
        num_vq_embeddings=32,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    return assemble(
        d.AmusedPipeline,
        vqvae=vqvae,
        transformer=transformer,
        scheduler=d.AmusedScheduler(mask_token_id=32),
    )


def cascade() -> Any:
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    def unet(**options: Any) -> Any:
        return d.StableCascadeUNet(
            **{
                "conditioning_dim": 16,
                "block_out_channels": (8, 16),
                "num_attention_heads": (1, 2),
                "down_num_layers_per_block": (1, 1),
                "up_num_layers_per_block": (1, 1),
                "clip_image_in_channels": WIDTH,
                "switch_level": (False,),
                **options,
            }
        )

    return assemble(
        d.StableCascadeCombinedPipeline,
        decoder=unet(
            in_channels=4,
            out_channels=4,
            effnet_in_channels=16,
            clip_text_pooled_in_channels=WIDTH,
            patch_size=2,
        ),
        prior_prior=unet(
            in_channels=16,
            out_channels=16,
            clip_text_in_channels=WIDTH,
            clip_text_pooled_in_channels=WIDTH,
        ),
        scheduler=d.DDPMWuerstchenScheduler(),
        prior_scheduler=d.DDPMWuerstchenScheduler(),
        vqgan=PaellaVQModel(
            bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=8, latent_channels=4
        ),
    )


def wuerstchen() -> Any:
    from diffusers.pipelines.deprecated.wuerstchen import (
        PaellaVQModel,
        WuerstchenDiffNeXt,
        WuerstchenPrior,
    )

    return assemble(
        d.WuerstchenCombinedPipeline,
        decoder=WuerstchenDiffNeXt(
            c_cond=WIDTH,
            c_hidden=[8, 8, 8, 8],
            nhead=[-1, 2, 2, 2],
            blocks=[1, 1, 1, 1],
            level_config=["CT", "CTA", "CTA", "CTA"],
            clip_embd=WIDTH,
            effnet_embd=16,
            inject_effnet=[False, True, True, True],
        ),
        prior_prior=WuerstchenPrior(c_in=16, c=8, c_cond=WIDTH, c_r=8, depth=2, nhead=2),
        scheduler=d.DDPMWuerstchenScheduler(),
        prior_scheduler=d.DDPMWuerstchenScheduler(),
        vqgan=PaellaVQModel(
            bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=8, latent_channels=4
        ),
    )


def kolors(name: str) -> Any:
    from diffusers.pipelines.kolors import ChatGLMModel

    glm = ChatGLMModel(
        num_layers=2,
        padded_vocab_size=65024,
        hidden_size=8,
        ffn_hidden_size=16,
        kv_channels=4,
        num_attention_heads=2,
        seq_length=256,
    )
    return assemble(getattr(d, name), unet=XL, text_encoder=glm, tokenizer=None)


def versatile() -> Any:
    from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import (
        UNetFlatConditionModel,
    )

    flat = UNET | {
        "down_block_types": ("DownBlockFlat", "CrossAttnDownBlockFlat"),
        "up_block_types": ("CrossAttnUpBlockFlat", "UpBlockFlat"),
    }
    return assemble(
        d.VersatileDiffusionTextToImagePipeline,
        image_unet=UNET,
        text_unet=UNetFlatConditionModel(**flat),
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "AltDiffusionPipeline": alt_diffusion,
    "AmusedPipeline": amused,
    "IFPipeline": if_,
    "Kandinsky3Pipeline": kandinsky_3,
    "KandinskyCombinedPipeline": kandinsky,
    "KandinskyV22CombinedPipeline": kandinsky_22,
    "LDMTextToImagePipeline": latent_diffusion,
    "LatentConsistencyModelPipeline": lambda: stable(
        "LatentConsistencyModelPipeline",
        unet={**UNET, "time_cond_proj_dim": 16},
        scheduler=d.LCMScheduler(),
    ),
    "SemanticStableDiffusionPipeline": lambda: stable("SemanticStableDiffusionPipeline"),
    "StableCascadeCombinedPipeline": cascade,
    "StableDiffusionLDM3DPipeline": lambda: stable("StableDiffusionLDM3DPipeline", vae=ldm3d_vae()),
    "StableDiffusionModelEditingPipeline": lambda: stable(
        "StableDiffusionModelEditingPipeline", scheduler=d.PNDMScheduler(skip_prk_steps=True)
    ),
    "StableDiffusionPAGPipeline": lambda: stable(
        "StableDiffusionPAGPipeline", pag_applied_layers=["mid"]
    ),
    "StableDiffusionPanoramaPipeline": lambda: stable("StableDiffusionPanoramaPipeline"),
    "StableDiffusionParadigmsPipeline": lambda: stable(
        "StableDiffusionParadigmsPipeline", scheduler=d.DDIMParallelScheduler()
    ),
    "StableDiffusionPipeline": lambda: stable("StableDiffusionPipeline"),
    "StableDiffusionPipelineSafe": lambda: stable("StableDiffusionPipelineSafe"),
    "StableDiffusionSAGPipeline": lambda: stable("StableDiffusionSAGPipeline"),
    "StableDiffusionXLPAGPipeline": lambda: assemble(
        d.StableDiffusionXLPAGPipeline, unet=XL, pag_applied_layers=["mid"], scheduler=karras()
    ),
    "StableDiffusionXLPipeline": lambda: assemble(
        d.StableDiffusionXLPipeline, unet=XL, scheduler=karras()
    ),
    "StableUnCLIPPipeline": stable_unclip,
    "VersatileDiffusionTextToImagePipeline": versatile,
    "WuerstchenCombinedPipeline": wuerstchen,
}


def ldm3d_vae() -> Any:
    return d.AutoencoderKL(
        in_channels=6,
        out_channels=6,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
