"""Random Flux models of two regimes, created on the spot, and the requests that benchmarks run.

In the small regime a forward pass over one sample leaves the processor mostly waiting, so a batch
costs little more (like small images on a large device). In the large regime a single sample fills
the processor, and a batch of n costs n times as much (like 1024x1024 on one device).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from bench.serving import folder
from jobs.catalog import Model, load_catalog
from jobs.request import ImageRequest
from pipelines.load import load_pipeline
from pipelines.seam import Pipeline
from workers.pass_timer import PassTimer, probe
from workers.profile import computes_here, measure
from workers.rehearsal import rehearse
from workers.scheduler import Costs

STEPS = (8, 20, 28)
"""Steps of the mixed trace: for a distilled model, a good scheduler, a cautious user."""

TEXT_WIDTH = 32


@dataclass(frozen=True, slots=True)
class Regime:
    """A model's size and the side of its images in pixels."""

    name: str
    side: int
    heads: int
    double_blocks: int
    single_blocks: int


SMALL = Regime("small", side=32, heads=4, double_blocks=2, single_blocks=4)
LARGE = Regime("large", side=256, heads=24, double_blocks=1, single_blocks=1)


def build(regime: Regime, place: Path) -> Model:
    """Write a random Flux pipeline of this regime and its catalog entry; return the entry."""
    torch.manual_seed(0)
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_config()),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=T5EncoderModel(_t5_config()),
        tokenizer_2=_t5_tokenizer(),
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=regime.double_blocks,
            num_single_layers=regime.single_blocks,
            attention_head_dim=16,
            num_attention_heads=regime.heads,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=False,
        ),
    )
    pipe.save_pretrained(place / regime.name)
    entry = (
        f'[models.{regime.name}]\npath = "./{regime.name}"\ndtype = "float32"\n'
        f"max_sequence_length = 16\n"
        f"defaults = {{ width = {regime.side}, height = {regime.side}, steps = 20, "
        f"guidance_scale = 1.0 }}\n"
    )
    (place / "models.toml").write_text(entry)
    return load_catalog(place / "models.toml").get(regime.name)


def loaded(regime: Regime) -> tuple[Pipeline, Model]:
    """A fresh random model of this regime, loaded on the CPU or the first accelerator."""
    with folder() as place:
        model = build(regime, place)
        return load_pipeline(model, device()), model


def measured(pipeline: Pipeline, model: Model) -> Costs:
    """What a worker's warm-up finds out about a model in an empty data folder."""
    costs = measure(pipeline, probe(model))
    timer = PassTimer(pipeline, device(), None, computes_here(model, device()))
    return replace(costs, same_bits=rehearse(model, costs, timer))


def device() -> str:
    """The device that benchmarks run on."""
    accelerator = torch.accelerator.current_accelerator()
    return f"{accelerator.type}:0" if accelerator is not None else "cpu"


def requests(
    model: Model, count: int, seed: int, steps: Sequence[int] = STEPS, *, reproducible: bool = False
) -> list[ImageRequest]:
    """`count` requests of the model's default size, with random steps and everything else fixed."""
    draw = random.Random(seed)
    return [
        ImageRequest(
            model=model.name,
            prompt=f"a drawing, number {i % 8}",
            seed=i,
            width=model.defaults.width,
            height=model.defaults.height,
            steps=draw.choice(list(steps)),
            guidance_scale=model.defaults.guidance_scale,
            reproducible=reproducible,
        )
        for i in range(count)
    ]


def _vae() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def _clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)


def _clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        projection_dim=TEXT_WIDTH,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def _t5_tokenizer() -> T5TokenizerFast:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocab += [(chr(code), -3.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def _t5_config() -> T5Config:
    return T5Config(
        vocab_size=98, d_model=TEXT_WIDTH, d_kv=8, d_ff=TEXT_WIDTH, num_layers=1, num_heads=4
    )
