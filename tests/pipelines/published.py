"""Small versions of published models' folders: their configs' sizes and flags, with tiny widths.

`save_published(name, folder)` writes one, based on a tiny pipeline of the same class. The values
come from the models' own config files.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.catalog import Defaults

_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "steps_offset": 1,
}
_FLOW = {"num_train_timesteps": 1000, "base_image_seq_len": 256, "max_image_seq_len": 4096}
_SHIFTS = {"base_shift": 0.5, "max_shift": 1.15}
_SIX_LEVELS: dict[str, Any] = {
    f"{part}_{what}": [value] * 6
    for part in ("encoder", "decoder")
    for what, value in (
        ("block_types", "ResBlock"),
        ("block_out_channels", 8),
        ("qkv_multiscales", []),
        ("layers_per_block", 1),
    )
}


@dataclass(frozen=True)
class Published:
    """A tiny pipeline's builder, the differences from it in each file, and the expected defaults.

    `scheduler` is the scheduler's class if it's a different one.
    """

    builder: str
    expected: Defaults
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    scheduler: str | None = None


def _unet(size: int, **more: Any) -> dict[str, dict[str, Any]]:
    return {"unet/config.json": {"sample_size": size, **more}}


def _transformer(size: int) -> dict[str, dict[str, Any]]:
    return {"transformer/config.json": {"sample_size": size}}


def _scheduler(**config: Any) -> dict[str, dict[str, Any]]:
    return {"scheduler/scheduler_config.json": config}


def _euler(spacing: str, **more: Any) -> dict[str, dict[str, Any]]:
    return _scheduler(**_DIFFUSION, timestep_spacing=spacing, **more)


def _sana(size: int) -> dict[str, dict[str, Any]]:
    return {**_transformer(size), "vae/config.json": _SIX_LEVELS}


_ANCESTRAL, _EULER = "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"
_ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}

PUBLISHED = {
    "FLUX.1-schnell": Published(
        "Flux",
        Defaults(1024, 1024, 4, 0.0),
        _scheduler(**_FLOW, **_SHIFTS, shift=1.0, use_dynamic_shifting=False),
    ),
    "FLUX.1-dev": Published(
        "FluxGuidance",
        Defaults(1024, 1024, 28, 3.5),
        _scheduler(**_FLOW, **_SHIFTS, shift=3.0, use_dynamic_shifting=True),
    ),
    "FLUX.2-klein-4B": Published(
        "Flux2Klein", Defaults(1024, 1024, 4, 1.0), {"model_index.json": {"is_distilled": True}}
    ),
    "FLUX.2-klein-base-4B": Published(
        "Flux2Klein", Defaults(1024, 1024, 50, 4.0), {"model_index.json": {"is_distilled": False}}
    ),
    "Z-Image-Turbo": Published(
        "ZImage",
        Defaults(1024, 1024, 8, 0.0),
        _scheduler(num_train_timesteps=1000, use_dynamic_shifting=False, shift=3.0),
    ),
    "Z-Image": Published(
        "ZImage",
        Defaults(1024, 1024, 50, 5.0),
        _scheduler(num_train_timesteps=1000, use_dynamic_shifting=False, shift=6.0),
    ),
    "stable-diffusion-v1-5": Published("SD15", Defaults(512, 512, 50, 7.5), _unet(64)),
    "stable-diffusion-v1-4, as diffusers 0.2 wrote it": Published(
        "SD15", Defaults(512, 512, 50, 7.5), _unet(32, _diffusers_version="0.2.2")
    ),
    "stable-diffusion-2-1": Published(
        "SD15",
        Defaults(768, 768, 50, 7.5),
        {**_unet(96), **_scheduler(prediction_type="v_prediction", steps_offset=1)},
        scheduler="DDIMScheduler",
    ),
    "sd-turbo": Published(
        "SD15", Defaults(512, 512, 1, 0.0), {**_unet(64), **_euler("trailing")}, scheduler=_EULER
    ),
    "LCM_Dreamshaper_v7": Published(
        "SD15",
        Defaults(768, 768, 4, 8.5),
        {
            **_unet(96, time_cond_proj_dim=256),
            **_scheduler(original_inference_steps=50),
            "model_index.json": {"_class_name": "LatentConsistencyModelPipeline"},
        },
        scheduler="LCMScheduler",
    ),
    "stable-diffusion-xl-base-1.0": Published(
        "SDXL", Defaults(1024, 1024, 50, 5.0), {**_unet(128), **_euler("leading")}
    ),
    "sdxl-turbo": Published(
        "SDXL", Defaults(512, 512, 1, 0.0), {**_unet(64), **_euler("trailing")}, _ANCESTRAL
    ),
    "SDXL-Lightning": Published(
        "SDXL", Defaults(1024, 1024, 4, 0.0), {**_unet(128), **_euler("trailing")}
    ),
    "noobai-XL-Vpred": Published(
        "SDXL",
        Defaults(1024, 1024, 50, 5.0),
        {**_unet(128), **_scheduler(**_DIFFUSION | _ZERO_SNR, timestep_spacing="trailing")},
    ),
    "lcm-sdxl": Published(
        "SDXL",
        Defaults(1024, 1024, 4, 8.5),
        {**_unet(128, time_cond_proj_dim=256), **_scheduler(original_inference_steps=50)},
        scheduler="LCMScheduler",
    ),
    "SDXL with LCM-LoRA": Published(
        "SDXL",
        Defaults(1024, 1024, 4, 0.0),
        {**_unet(128), **_scheduler(original_inference_steps=50)},
        scheduler="LCMScheduler",
    ),
    "stable-diffusion-3.5-large": Published(
        "SD3", Defaults(1024, 1024, 28, 7.0), {**_transformer(128), **_scheduler(shift=3.0)}
    ),
    "Qwen-Image": Published("QwenImage", Defaults(1024, 1024, 50, 4.0)),
    "Sana_1600M_512px": Published("Sana", Defaults(512, 512, 20, 4.5), _sana(16)),
    "Sana_1600M_1024px": Published("Sana", Defaults(1024, 1024, 20, 4.5), _sana(32)),
    "Sana_1600M_4Kpx": Published("Sana", Defaults(4096, 4096, 20, 4.5), _sana(128)),
    "PixArt-Sigma-XL-2-512-MS": Published(
        "PixArtSigma", Defaults(512, 512, 20, 4.5), _transformer(64)
    ),
    "PixArt-Sigma-XL-2-1024-MS": Published(
        "PixArtSigma", Defaults(1024, 1024, 20, 4.5), _transformer(128)
    ),
}


def save_published(name: str, tiny: Path, folder: Path) -> Path:
    """Write the named model, based on the folder of its tiny pipeline."""
    model = PUBLISHED[name]
    shutil.copytree(tiny, folder)
    for file, config in model.configs.items():
        path = folder / file
        known = json.loads(path.read_text())
        if path.parent.name == "scheduler":  # as published, without the tiny one's values
            known = {"_class_name": model.scheduler or known["_class_name"]}
        path.write_text(json.dumps(known | config))
    if model.scheduler:
        path = folder / "model_index.json"
        index = json.loads(path.read_text()) | {"scheduler": ["diffusers", model.scheduler]}
        path.write_text(json.dumps(index))
    return folder
