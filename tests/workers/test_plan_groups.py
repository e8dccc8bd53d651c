"""`plan` counts the same bytes for a group as its ranks hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel

from jobs.catalog import Model
from pipelines.loading.checkpoint import find_checkpoint
from pipelines.placements.stages import Stage, plan_stages
from pipelines.planner.case import Case
from pipelines.planner.groups import cut
from pipelines.planner.skeleton import parts, skeletons
from tests.imagemill.configs import save_configs


def z_image(folder: Path) -> Path:
    """A small model whose refiners are lists of blocks that stay with the first stage."""
    sizes: dict[str, Any] = {"dim": 64, "n_layers": 6, "n_heads": 2, "n_kv_heads": 2}
    with torch.device("meta"):
        model = ZImageTransformer2DModel(**sizes, axes_dims=[8, 12, 12], cap_feat_dim=16)
    (folder / "transformer").mkdir(parents=True)
    model.save_config(folder / "transformer")
    index = {
        "_class_name": "ZImagePipeline",
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("make", [save_configs, z_image])
@pytest.mark.parametrize("stages", [2, 4])
def test_plan_counts_what_stages_hold(tmp_path: Path, make: Any, stages: int) -> None:
    folder = make(tmp_path / "model")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").touch()
    model = Model("m", str(folder), local=True, placement="pipelined", stages=stages)
    checkpoint = find_checkpoint(model)
    modules = skeletons(model, checkpoint)
    case = Case(model, modules, parts(modules, checkpoint, model), checkpoint, [2**40] * 4, 0)
    shares, rest = cut(case, stages)
    for rank in range(stages):
        plan = plan_stages(model, checkpoint)
        stage = Stage(plan.module, plan.stages[rank])
        tensors = [*stage.module.parameters(), *stage.module.buffers()]
        assert sum(t.numel() * t.element_size() for t in tensors) == rest + shares[rank]
