"""Replica: the whole model on one device. Run more workers on the queue for more replicas."""

from functools import partial

import torch

from jobs.catalog import Model
from pipelines.acceleration import compile_blocks, denoiser_of, enable_cache, run_once
from pipelines.attention import choose_attention
from pipelines.cpu import tune
from pipelines.device import use_device
from pipelines.families import make_family
from pipelines.graphs import check_graphs, enable_graphs
from pipelines.loading.checkpoint import Checkpoint
from pipelines.loading.quantization import check_quantization, quantizers
from pipelines.out_of_memory import reports_out_of_memory
from pipelines.placements.family_pipeline import FamilyPipeline


def load_replica(model: Model, checkpoint: Checkpoint, device: str) -> FamilyPipeline:
    """Load everything onto `device`. Raises ModelUnavailable, ConfigurationError, OutOfMemory."""
    check_quantization(model, checkpoint)
    if model.cuda_graphs:
        check_graphs(torch.device(device))
    use_device(torch.device(device))
    pipe = checkpoint.load(model, quantizers(model, checkpoint, device))
    move = reports_out_of_memory(pipe.to)
    family = make_family(move(device), model.max_sequence_length)
    pipeline = FamilyPipeline(family, device=torch.device(device))
    denoiser, trial = denoiser_of(pipe), partial(run_once, pipeline, model)
    choose_attention(denoiser, model.attention_backend, torch.device(device), trial)
    enable_cache(denoiser, model)
    if model.compile:
        compile_blocks(denoiser, trial)
    else:
        tune(pipe, denoiser, torch.device(device))
    if model.cuda_graphs:
        enable_graphs(denoiser)
    return pipeline
